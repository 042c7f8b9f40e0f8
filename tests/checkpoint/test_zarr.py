"""Checkpoints of kind zarr: chunks of several ranks, bfloat16, and what zarr itself writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.weights import read_weights
from tests.support.layouts import write_zarr

STACKED = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_all_ranks_are_put_together(tmp_path: Path, dtype: torch.dtype, ranks: int) -> None:
    """Three ranks do not divide the rows: the last chunk is partly empty."""
    stored = {"model.layers.weight": STACKED.to(dtype), "model.norm": STACKED[0, 0].to(dtype)}
    write_zarr(tmp_path / "w", stored, ranks)
    weights = read_weights(tmp_path / "w")
    assert set(weights) == set(stored) and len(weights) == 2  # what is no array is left out
    for name, tensor in stored.items():
        assert (weights.shape(name), weights.dtype(name)) == (tensor.shape, dtype)
        assert torch.equal(weights[name], tensor)
    assert [torch.equal(weights.layer("model.layers.weight", n), STACKED[n].to(dtype)) for n in range(3)] == [True] * 3


def test_arrays_that_zarr_itself_has_written(tmp_path: Path) -> None:
    """As megatron-core created them: format 2, no compressor, every chunk written."""
    import zarr

    array = zarr.create_array(
        tmp_path / "a", shape=(5, 4), chunks=(2, 4), dtype="<f4", zarr_format=2, compressors=None, filters=None,
        config={"write_empty_chunks": True},
    )  # fmt: skip
    array[:] = STACKED[0, :5].numpy()
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert torch.equal(read_weights(tmp_path)["a"], STACKED[0, :5])


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zarr(tmp_path / "w", {"a": STACKED})
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(CheckpointError, match=r"pip install 'nemo_dpo\[zarr\]'"):
        read_weights(tmp_path / "w")
