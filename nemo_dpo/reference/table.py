"""A table of reference log-probs on disk: a row for each pair of a split, named columns for each of its responses.

A folder holds `rows.bin` (one `ROW` after the other, in the order of the split) and `header.json` (pairs, columns, and
the key: everything that decides the values). While a table is filled its folder is called `….unfinished` and
`rows.bin` has as many rows as are done, so that a killed run goes on behind the last whole one; the folder gets its
own name when every row is on the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from nemo_dpo.checkpoint import CheckpointError, SaveError
from nemo_dpo.checkpoint.archive import sync_folder

# Each column holds a value for the chosen and one for the rejected response.
ROW = np.dtype(
    [
        ("logps", "<f4", 2),  # natural log, summed over the response's tokens
        ("tokens", "<i4", 2),  # number of the response's tokens
    ]
)
HEADER, ROWS = "header.json", "rows.bin"
UNFINISHED = ".unfinished"

Rows = npt.NDArray[np.void]  # [pairs] of ROW


@dataclass(frozen=True)
class Header:
    """What a table is of: number of pairs, and by name everything that decides its values, as json has it."""

    pairs: int
    key: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As header.json has it."""
        columns = {name: field[0].base.str for name, field in (ROW.fields or {}).items()}
        return {"pairs": self.pairs, "columns": columns, "responses": ["chosen", "rejected"], "key": dict(self.key)}

    def check(self, folder: Path) -> None:
        """Refuse the table in `folder` unless it is of this.

        Raises:
            CheckpointError: naming what differs, as it was and as it is.
        """
        changes = "; ".join(_changes(_read_header(folder), self.to_dict()))
        if changes:
            raise CheckpointError(
                f"{folder} holds log-probs of another reference or of other pairs: {changes}. Restore what changed, "
                "set another model.dpo.reference.cache_dir, or delete the folder to compute them again"
            )


def _read_header(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / HEADER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / HEADER}: cannot be read ({error}); delete {folder} to start again") from error


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _changes(was, now)
        elif was != now:
            yield f"{name} was {was} and is {now}"


def open_table(folder: Path, header: Header) -> Rows:
    """Map a complete table.

    Raises:
        CheckpointError: it is not there, is of something else, or has lost rows.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not there, although rank 0 has written it; set model.dpo.reference.cache_dir to a folder "
            "that all hosts see"
        )
    header.check(folder)
    path, size = folder / ROWS, header.pairs * ROW.itemsize
    if not path.is_file() or path.stat().st_size != size:
        raise CheckpointError(f"{path}: not the {size} bytes that were written; delete {folder} to compute them again")
    return np.memmap(path, dtype=ROW, mode="r")


def rows_on_disk(folder: Path) -> int:
    """Rows of all tables in `folder`, finished or not."""
    return sum(path.stat().st_size // ROW.itemsize for path in folder.glob(f"*/{ROWS}"))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system refuses inside becomes a SaveError about `path`."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"{path}: cannot be written ({error.strerror}); free or mend it and start again, which goes on from the "
            "rows that are there, or set another model.dpo.reference.cache_dir"
        ) from error


class TableWriter:
    """Writes the rows of `folder` in order, from wherever an earlier run stopped. One process does it at a time."""

    def __init__(self, folder: Path, header: Header) -> None:
        self._folder = folder
        self._unfinished = folder.with_name(folder.name + UNFINISHED)
        self._header = header
        self._file: IO[bytes] | None = None

    def begin(self) -> int:
        """Start a new table or go on with an unfinished one; returns how many rows are done.

        All are if another run has finished the table since this one looked for it.

        Raises:
            CheckpointError: what is unfinished there is of something else, or another run is filling it.
            SaveError: it cannot be written.
        """
        with _writing(self._unfinished):
            self._unfinished.mkdir(parents=True, exist_ok=True)
            self._file = (self._unfinished / ROWS).open("ab")
            self._lock(self._file)
            if self._folder.is_dir():
                shutil.rmtree(self._unfinished, ignore_errors=True)  # if there is one, it was made three lines above
                return self._header.pairs
            if (self._unfinished / HEADER).exists():
                self._header.check(self._unfinished)
            else:
                self._write_header()
            done = self._file.seek(0, os.SEEK_END) // ROW.itemsize
            self._file.truncate(done * ROW.itemsize)  # a kill may have cut a row in two
        return done

    def _lock(self, file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{self._unfinished}: another run is filling it; wait for its end, or set another "
                "model.dpo.reference.cache_dir"
            ) from error

    def append(self, rows: Rows) -> None:
        """Add rows behind those that are there; they are on the disk afterwards.

        Raises:
            SaveError: they are not; a next start goes on from the rows before.
        """
        assert self._file is not None
        with _writing(self._unfinished / ROWS):
            self._file.write(rows.tobytes())
            self._sync(self._file)

    def finish(self) -> None:
        """Give the table its name, unless another run has: all rows are there.

        Raises:
            SaveError: it cannot be renamed.
        """
        if self._folder.is_dir():
            return
        with _writing(self._folder):
            os.replace(self._unfinished, self._folder)
            sync_folder(self._folder.parent)

    def close(self) -> None:
        """Let other processes write."""
        if self._file is not None:
            self._file.close()

    def _write_header(self) -> None:
        fresh = self._unfinished / (HEADER + ".tmp")
        with fresh.open("wb") as file:
            file.write(json.dumps(self._header.to_dict(), indent=1).encode())
            self._sync(file)
        os.replace(fresh, self._unfinished / HEADER)
        sync_folder(self._unfinished)

    @staticmethod
    def _sync(file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())
