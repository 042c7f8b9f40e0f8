"""A file that is not what was written is found and named."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_dpo.checkpoint import CheckpointError, manifest
from nemo_dpo.checkpoint.manifest import MANIFEST, Entry

FILES = {"__0_0.distcp": os.urandom(5_000_000), "common.pt": b"common", "empty": b""}  # more than a block; little; none


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    manifest.write(tmp_path, manifest.describe(tmp_path / name for name in FILES))
    return tmp_path


def check(folder: Path) -> None:
    manifest.check(folder, manifest.read(folder))


def test_what_was_written_passes(folder: Path) -> None:
    check(folder)
    entries = manifest.read(folder)
    assert entries == {name: Entry(len(data), f"{zlib.crc32(data):08x}") for name, data in FILES.items()}
    assert manifest.total(entries) == 5_000_006


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4_500_000] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, 4_999_999)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, "has CRC-32 [0-9a-f]{8} and was written with [0-9a-f]{8}"),
        (cut, "has 4999999 bytes and was written with 5000000"),
        (Path.unlink, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(folder / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=f"{folder / '__0_0.distcp'} {message}"):
        check(folder)


@pytest.mark.parametrize("text", [None, "", "[]", '{"files": {"common.pt": 3}}', '{"files": {"common.pt": {}}}'])
def test_a_damaged_manifest_is_named(folder: Path, text: str | None) -> None:
    if text is None:
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{folder / MANIFEST} cannot be read"):
        check(folder)


def test_every_file_is_checked_by_one_rank() -> None:
    entries = {f"{size}": Entry(size, "") for size in (1, 2, 3, 50, 51, 52, 99, 100, 101)}
    shares = [manifest.share(entries, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(entries)
    assert [manifest.total(share) for share in shares] == [150, 153, 156]
