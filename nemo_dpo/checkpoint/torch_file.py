"""Read what torch.save wrote, from files that nobody vouches for.

`weights_only` keeps code out. What it leaves is checked here: records are stored, not compressed, so that none is
larger in memory than on the disk, and no tensor claims more values than its storage has. Files older than torch 1.6 are
no zip archives: pickles, then the values. No number in those pickles may be beyond what the file can hold.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError

ZIP_MARK = b"PK\x03\x04"
OLDER_PARTS = ("magic number", "version", "description of the system", "object", "list of storages")  # each a pickle
# Transformer Engine's fp8 state: no weight, and often no tensor.
EXTRA_STATE = "_extra_state"
# What torch raises on bytes that torch.save has not written.
_DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def load(source: Path | IO[bytes], label: str, *, mapped: bool = True) -> Any:
    """The object that torch.save wrote.

    Args:
        source: the file. Of a path, tensors are mapped into memory and read when they are used.
        label: names it in messages.
        mapped: false for a path to a file older than torch 1.6 (see `is_older`), which is read as a whole.

    Raises:
        CheckpointError: `label` is damaged, or holds more than tensors, numbers and texts.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
            (_check_records if mapped else _check_pickles)(file)
            stack.enter_context(torch.serialization.safe_globals([io.BytesIO]))  # what an extra state is wrapped in
            if isinstance(source, Path) and mapped:
                return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
            return torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise CheckpointError(f"{label} is damaged or not trusted ({reason(error)}); copy it again") from error


def is_older(path: Path) -> bool:
    """Whether the file is not of the form that torch writes since 1.6."""
    try:
        with path.open("rb") as file:
            return file.read(len(ZIP_MARK)) != ZIP_MARK
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def reason(error: Exception) -> str:
    """The first line of what torch says, without its advice, or the name of an error that says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def load_tensors(source: Path | IO[bytes], label: str, *, mapped: bool = True) -> dict[str, Tensor]:
    """The flat dictionary of tensors that torch.save wrote, extra states left out; see `load`."""
    stored = load(source, label, mapped=mapped)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{label} is no flat dictionary of tensors, but a {type(stored).__name__}")
    kept = {str(name): value for name, value in stored.items() if not str(name).endswith(EXTRA_STATE)}
    for name, value in kept.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{label} is no flat dictionary of tensors: {name} is a {type(value).__name__}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{label}: {name} is no plain tensor")
        if value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(f"{label}: {name} claims {value.nbytes} bytes, more than are stored; not trusted")
    return {name: value.detach() for name, value in kept.items()}


def _check_records(file: IO[bytes]) -> None:
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as records:
        for record in records.infolist():
            packed = record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size
            if packed or record.header_offset + record.compress_size > size:
                raise ValueError(f"record {record.filename!r} is compressed, or longer than the file")
    file.seek(0)


def _check_pickles(file: IO[bytes]) -> None:
    """Refuse numbers beyond the size of the file, which an unpickler would make a table or a storage for."""
    size = file.seek(0, io.SEEK_END)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pickles:  # no text is longer than the rest
        for part in OLDER_PARTS:
            for opcode, argument, _ in pickletools.genops(pickles):  # type: ignore[arg-type]  # reads like a file
                if part != "magic number" and isinstance(argument, int) and argument > size:
                    raise ValueError(f"its {part} has the number {argument} ({opcode.name}), the file {size} bytes")
    file.seek(0)
