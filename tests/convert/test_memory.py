"""A conversion holds no more than two of the model's largest layers, whatever the size of the model and its files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint.weights import Chunk, read_weights, write_weights
from nemo_dpo.convert.compare import compare
from nemo_dpo.convert.hf import write_safetensors
from nemo_dpo.convert.opened import open_checkpoint
from nemo_dpo.convert.safetensors_file import Entry

ROOT = Path(__file__).resolve().parents[2]
# Beyond two layers: buffers of files, headers, small objects, and pages that the allocator keeps. 8 MB are seen. The
# whole checkpoint, 250 MB in one shard, is many times that.
CONSTANT = 24_000_000


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/convert.py, which writes checkpoints of a given size."""
    spec = importlib.util.spec_from_file_location("convert_benchmark", ROOT / "benchmarks" / "convert.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("experts", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_peak_of_both_directions(benchmark: ModuleType, tmp_path: Path, experts: int) -> None:
    """With experts, which are stacked, one layer's of all of them are in memory."""
    benchmark.write_checkpoint(tmp_path / "tiny" / "hf", 2_000_000, experts)
    benchmark.write_checkpoint(tmp_path / "large" / "hf", 250_000_000, experts)
    entries, largest = benchmark.sizes(tmp_path / "large" / "hf")
    assert sum(entry.nbytes for entry in entries) > 3 * (2 * largest + CONSTANT)  # or nothing would be shown
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "convert" / "memory_probe.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert peaks["bf16"] < 2 * largest + CONSTANT
    assert peaks["back"] < 2 * largest + CONSTANT
    assert peaks["32"] < 2 * (2 * largest) + CONSTANT  # a layer takes twice as much in fp32


class Alive:
    """Counts the tensors of a stream that are alive at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def tensor(self, *shape: int) -> torch.Tensor:
        import weakref

        made = torch.ones(*shape)
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(made, self._gone)
        return made

    def _gone(self) -> None:
        self.now -= 1


def test_a_shard_is_written_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive = Alive()
    entries = [Entry(f"t{number}", torch.float32, (3, 5)) for number in range(8)]
    write_safetensors(tmp_path, entries, ((entry.name, alive.tensor(3, 5)) for entry in entries))
    assert alive.most == 1 and (tmp_path / "model.safetensors").is_file()


def test_a_nemo_is_written_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive = Alive()
    write_weights(tmp_path / "w", (Chunk("t", alive.tensor(4), number, 8) for number in range(8)))
    assert alive.most == 1 and len(read_weights(tmp_path / "w")) == 1


def test_a_comparison_holds_one_tensor_of_each(llama: Any) -> None:
    alive = Alive()
    with open_checkpoint(llama()) as opened:

        class Counted(type(opened)):  # type: ignore[misc]
            def tensors(self, *arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
                for entry in self.entries():
                    yield entry.name, alive.tensor(*entry.shape)

        counted = Counted(opened.path, opened.folder, opened.family, opened.config, opened.weights)
        assert compare(counted, counted).equal
    assert alive.most == 2
