"""What the files of a checkpoint are, so that a damaged one is noticed before it is used: size and CRC-32 of each.

CRC-32 because it is as fast as memory (docs/checkpoints.md has the figures) and finds what disks and copies do to
files; whoever may write into the folder could change the manifest, too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from nemo_dpo.checkpoint import CheckpointError

MANIFEST = "manifest.json"
_BLOCK = 2**22  # bytes read at a time


class Entry(NamedTuple):
    """One file: its size in bytes and its CRC-32 in eight hexadecimal digits."""

    bytes: int
    crc32: str


def describe(files: Iterable[Path]) -> dict[str, Entry]:
    """The entries of `files` by name; reads all of them."""
    return {file.name: Entry(file.stat().st_size, _crc32(file)) for file in files}


def write(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest of `folder`."""
    files = {name: entry._asdict() for name, entry in sorted(entries.items())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def read(folder: Path) -> dict[str, Entry]:
    """The entries of a checkpoint.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): Entry(int(entry["bytes"]), str(entry["crc32"])) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({error})") from error


def check(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Compare the files with their `entries`; sizes first, which costs nothing.

    Raises:
        CheckpointError: naming the first file that is missing, cannot be read, or is not what was written.
    """
    try:
        for name, entry in entries.items():
            size = (folder / name).stat().st_size
            if size != entry.bytes:
                raise CheckpointError(f"{folder / name} has {size} bytes and was written with {entry.bytes}")
        for name, entry in entries.items():
            found = _crc32(folder / name)
            if found != entry.crc32:
                raise CheckpointError(f"{folder / name} has CRC-32 {found} and was written with {entry.crc32}")
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror or error})") from error


def share(entries: Mapping[str, Entry], rank: int, world: int) -> dict[str, Entry]:
    """The entries that `rank` of `world` checks: about as many bytes for each."""
    by_size = sorted(entries.items(), key=lambda item: (item[1].bytes, item[0]))
    return dict(by_size[rank::world])


def total(entries: Mapping[str, Entry]) -> int:
    """Bytes of all files."""
    return sum(entry.bytes for entry in entries.values())


def _crc32(file: Path) -> str:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
