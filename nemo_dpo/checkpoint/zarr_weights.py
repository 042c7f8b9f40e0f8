"""Read distributed checkpoints of kind `zarr`, which older versions of megatron-core wrote and newer do not read.

Each parameter is a zarr array of format 2 in a folder of its own, named by its key: `.zarray` describes it, every other
file is a chunk, the part of one rank, uncompressed. Since the zarr package knows no bfloat16, which megatron-core notes
as the type `bfloat16`, such an array is read as whole numbers of two bytes whose bits are taken as they are.

What `.zarray` says is checked against the files first: it may name code that unpacks chunks, and claim any size.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.stored import Weights

ARRAY_FILE = ".zarray"
# Type in `.zarray` → the type read and the type it is taken for.
DTYPES = {
    "bfloat16": ("<u2", torch.bfloat16),
    "<V2": ("<u2", torch.bfloat16),  # as it is noted where tensorstore was missing
    "<f2": ("<f2", torch.float16),
    "<f4": ("<f4", torch.float32),
    "<f8": ("<f8", torch.float64),
}
UNPACKED: dict[str, object] = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None}


class ZarrWeights(Weights):
    """The tensors of a checkpoint of kind `zarr`."""

    def __init__(self, folder: Path) -> None:
        """Check the description of every array against its files.

        Raises:
            CheckpointError: the zarr package is missing, a description that is damaged or not megatron-core's, chunks
                that are missing or truncated.
        """
        try:
            import zarr  # noqa: F401  an optional package: said before any work
        except ImportError as error:
            raise CheckpointError(
                f"{folder}: a checkpoint of kind 'zarr' is read by the package zarr; pip install 'nemo_dpo[zarr]'"
            ) from error
        self._folder = folder
        arrays = sorted(path.parent for path in folder.glob(f"*/{ARRAY_FILE}"))
        self._described = {array.name: _description(array) for array in arrays}

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, ...)

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._described[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._described[name]["dtype"]][1]

    def layer(self, name: str, index: int) -> Tensor:
        return self._read(name, index)

    def _read(self, name: str, where: Any) -> Tensor:
        import zarr
        from zarr.storage import LocalStore, StorePath

        described = self._described[name]
        stored, taken = DTYPES[described["dtype"]]
        place = StorePath(LocalStore(self._folder / name, read_only=True))
        array = zarr.Array.from_dict(place, {**described, "dtype": stored})
        values = torch.from_numpy(array[where])
        return values.view(taken)


def _description(array: Path) -> dict[str, Any]:
    """The contents of `.zarray`, checked."""
    try:
        described = json.loads((array / ARRAY_FILE).read_text(encoding="utf-8"))
        shape, chunks = described["shape"], described["chunks"]
        sizes = all(isinstance(size, int) and size > 0 for size in (*shape, *chunks))
        known = sizes and len(shape) == len(chunks) and described["dtype"] in DTYPES
        known = known and all(described[key] == value for key, value in UNPACKED.items())
        separator = described.get("dimension_separator", ".")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{array}: {ARRAY_FILE} is damaged ({error}); copy the checkpoint again") from error
    if not known or separator != ".":
        raise CheckpointError(
            f"{array}: {ARRAY_FILE} describes no uncompressed array of {', '.join(DTYPES)}, as megatron-core writes"
        )
    _check_chunks(array, shape, chunks, DTYPES[described["dtype"]][1].itemsize)
    return dict(described)


def _check_chunks(array: Path, shape: list[int], chunks: list[int], itemsize: int) -> None:
    """Every chunk is there and has its full size; zarr would fill the place of a missing one."""
    sizes = {file.name: file.stat().st_size for file in array.iterdir() if file.is_file()}
    counts = [-(-whole // part) for whole, part in zip(shape, chunks, strict=True)]
    if math.prod(counts) > len(sizes):
        raise CheckpointError(f"{array}: {math.prod(counts)} chunks are described, {len(sizes)} files are there")
    for place in itertools.product(*map(range, counts)):
        name, expected = ".".join(map(str, place)) or "0", math.prod(chunks) * itemsize
        if sizes.get(name) != expected:
            raise CheckpointError(
                f"{array}: chunk {name} has {sizes.get(name)} bytes, expected {expected}; copy the checkpoint again"
            )
