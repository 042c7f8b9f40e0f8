"""The safetensors layout, read and written one tensor at a time.

The library of that name writes a file from tensors that are all in memory, and reads through a map of the file, whose
pages count as memory of the process until the file is closed. The layout is small (github.com/huggingface/safetensors,
section "Format"): eight bytes, little-endian, with the length of the header; the header, JSON, filled up with blanks to
a multiple of eight; the data. The header says name → dtype, shape and [begin, end) in the data, which has no gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.json_file import parse_object

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one file by name. Each is read when asked for, into memory of its own."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: it cannot be read, or does not describe the file that it is in.
        """
        self._path = path
        try:
            self._places = _places(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}); copy it again") from error

    def __getitem__(self, name: str) -> Tensor:
        entry, start = self._places[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                count = file.readinto(_bytes(tensor))
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        if count != entry.nbytes:
            raise CheckpointError(f"{self._path}: truncated or damaged ({name} ends early); copy it again")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def entry(self, name: str) -> Entry:
        """Shape and dtype; reads no data."""
        return self._places[name][0]


def write_file(path: Path, entries: Sequence[Entry], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write `path`, taking exactly the tensors of `entries`, in that order, from `tensors`.

    One tensor is in memory at a time, besides what `tensors` itself holds.

    Raises:
        CheckpointError: another tensor comes than was announced.
        OSError: it cannot be written.
    """
    header, starts = _layout(entries)
    with path.open("wb") as file:
        file.write(header)
        for entry in entries:
            name, tensor = next(tensors, ("nothing", torch.empty(0)))
            if Entry(name, tensor.dtype, tuple(tensor.shape)) != entry:
                raise CheckpointError(f"{path.name}: {entry} was announced, {name} {list(tensor.shape)} came")
            file.seek(starts[name])
            file.write(_bytes(tensor.contiguous()))
            del tensor  # or it would live on while the next one is made


def _layout(entries: Sequence[Entry]) -> tuple[bytes, dict[str, int]]:
    """The file's beginning, header included, and where in the file each tensor's bytes go.

    Wider types come first in the data, as the library puts them, so that every tensor is aligned; torch insists on it.
    """
    places: dict[str, int] = {}
    size = 0
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        places[entry.name] = size
        size += entry.nbytes
    header: dict[str, Any] = {METADATA: {"format": "pt"}}  # transformers and PEFT ask for it
    for entry in entries:
        offsets = [places[entry.name], places[entry.name] + entry.nbytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = LENGTH.size + len(text)
    return LENGTH.pack(len(text)) + text, {name: begin + place for name, place in places.items()}


def _places(path: Path) -> dict[str, tuple[Entry, int]]:
    """Name → (entry, where its bytes begin in the file), each checked to lie in the file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        begin = file.read(LENGTH.size)
        length = LENGTH.unpack(begin)[0] if len(begin) == LENGTH.size else size
        if length > min(MAX_HEADER_BYTES, size - LENGTH.size):
            raise ValueError("its header is longer than the file")
        header = parse_object(file.read(length))
    data = LENGTH.size + length
    return {name: _place(name, item, data, size) for name, item in header.items() if name != METADATA}


def _place(name: str, item: Mapping[str, Any], data: int, size: int) -> tuple[Entry, int]:
    shape, offsets = _whole_numbers(item["shape"], name), _whole_numbers(item["data_offsets"], name)
    entry = Entry(name, DTYPES[item["dtype"]], shape)
    start, end = offsets
    # Of no values at all, but of sizes whose product no address reaches: torch would not make it.
    reach = math.prod(max(1, length) for length in shape) * entry.dtype.itemsize
    if end - start != entry.nbytes or data + end > size or reach >= 2**63:
        raise ValueError(f"{name} is not where the header says")
    return entry, data + start


def _whole_numbers(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
        raise ValueError(f"{name} has a shape or a place that is no list of whole numbers")
    return tuple(value)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    values: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return values
