"""Our reader and writer of the safetensors layout and the library's understand each other."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.hf import write_safetensors
from nemo_dpo.convert.safetensors_file import DTYPES, Entry, SafetensorsFile, write_file

# An odd number of narrow values before wide ones: aligned only if the wide ones come first in the file.
TENSORS = {
    "bf16": torch.randn(3, dtype=torch.float32).to(torch.bfloat16),
    "fp32": torch.tensor([[1.5, float("nan")], [-0.0, float("inf")]]),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "bool": torch.tensor([True, False, True]),
    "view": torch.arange(12.0).reshape(3, 4).t()[1:],
}


def entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", entries(TENSORS), iter(TENSORS.items()))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys() and all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])[0] % 8 == 0


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    whole |= {str(dtype): torch.zeros(3, dtype=dtype) for dtype in DTYPES.values()}
    save_file(whole, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file) == set(whole) and len(file) == len(whole)
    assert all(same(file[name], whole[name]) for name in whole)
    assert file.entry("fp32") == Entry("fp32", torch.float32, (2, 2))


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    announced = [Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (2,))]
    a, b, wide = ("a", torch.ones(2)), ("b", torch.ones(2)), ("b", torch.ones(3))
    for given in ([b, a], [a, wide], [a], [a, b, b], [a, ("b", torch.ones(2).half())]):
        with pytest.raises(CheckpointError, match="announced"):
            write_safetensors(tmp_path, announced, given)


def header(path: Path, change: Any) -> None:
    """Change the header of a file in place; its length may change, the data moves with it."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    text = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: {"a": {**h["a"], "data_offsets": [0, 80]}},
        lambda h: {"a": {**h["a"], "data_offsets": [-8, 0]}},
        lambda h: {"a": {**h["a"], "data_offsets": [4, 12]}},
        lambda h: {"a": {**h["a"], "shape": [-1, -2]}},
        lambda h: {"a": {**h["a"], "shape": ["2"]}},
        lambda h: {"a": {**h["a"], "dtype": "F4"}},
        lambda h: {"a": {"dtype": "F32", "shape": [2]}},
        lambda h: {"a": None},
        lambda h: [h],
    ],
)
def test_a_header_that_does_not_describe_the_file(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    header(path, change)
    with pytest.raises(CheckpointError, match="truncated or damaged") as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"abc", b"\xff" * 8, b"\x08" + b"\0" * 7 + b"notjson!", b"\x64" + b"\0" * 7])
def test_files_that_are_something_else(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        SafetensorsFile(tmp_path / "x.safetensors")
