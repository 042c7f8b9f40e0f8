"""What Weights & Biases would get of a run that was offline."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32768


def wandb_steps(log_dir: Path) -> tuple[int, list[int]]:
    """How many runs its folders are of, and the training steps in them, in the order of their writing."""
    folders = sorted(log_dir.glob("logs/wandb/offline-run-*"))
    ids = {folder.name.rpartition("-")[2] for folder in folders}
    return len(ids), [step for folder in folders for step in _steps(next(folder.glob("*.wandb")))]


def _steps(file: Path) -> Iterator[int]:
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "train/loss" in row:
            yield int(row["trainer/global_step"])


def _records(content: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format behind 7 bytes of wandb's: blocks of 32 KiB; records of checksum, length, kind, data."""
    full, first, _middle, last = 1, 2, 3, 4
    at, collected = 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # too short for a record's head: filled with zeros
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        data = content[at + 7 : at + 7 + length]
        at += 7 + length
        collected = data if kind in (full, first) else collected + data
        if kind in (full, last):
            yield collected
