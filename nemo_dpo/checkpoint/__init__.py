"""Checkpoints on disk: `.nemo` archives, their weights, and the sharded training state.

Importing this package loads neither torch nor megatron-core; the modules that need them are imported by name.
"""

from __future__ import annotations

import errno
from pathlib import Path

from nemo_dpo.one_line import one_line


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, hostile or does not fit; the message names file, reason and remedy."""


class SaveError(CheckpointError):
    """A checkpoint or an archive could not be written: a failure of the run, nothing that its configuration asks."""


def io_error(error: OSError, output: Path) -> CheckpointError:
    """What to tell of an error of the system while `output` was being made: which file, read or written, and why.

    A file that the error names is one that was read, unless it is `output`, a folder above it or of the temporary names
    beside it, which begin with `.<name>.`. Writing to an open file names none.
    """
    name = error.filename
    if isinstance(name, str) and not _is_of(Path(name), output):
        return CheckpointError(f"{name}: cannot be read ({why(error)})")
    return SaveError(f"{output}: cannot be written ({why(error)})")


def why(error: OSError) -> str:
    """The system's reason, and what to do about a full disk."""
    text = error.strerror or one_line(error)
    return f"{text}; free some space" if error.errno == errno.ENOSPC else text


def _is_of(path: Path, output: Path) -> bool:
    return path in (output, *output.parents) or any(part.startswith(f".{output.name}.") for part in path.parts)
