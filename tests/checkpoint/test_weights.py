"""The distributed checkpoint inside a `.nemo`: torch reads what is written, and nothing in it is trusted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.weights import Chunk, check_metadata_pickle, read_weights, write_weights

STACKED = torch.arange(24, dtype=torch.float32).reshape(3, 4, 2)
WHOLE = torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model_weights"
    layers = [Chunk("model.stacked", STACKED[n], n, 3) for n in (2, 0, 1)]
    write_weights(path, iter([layers[0], Chunk("model.whole", WHOLE), *layers[1:]]))
    return path


def test_whole_and_stacked_tensors_come_back(folder: Path) -> None:
    weights = read_weights(folder)
    assert set(weights) == {"model.stacked", "model.whole"} and len(weights) == 2
    assert torch.equal(weights["model.stacked"], STACKED) and weights.shape("model.stacked") == (3, 4, 2)
    assert torch.equal(weights["model.whole"], WHOLE) and weights.dtype("model.whole") is torch.bfloat16
    assert [torch.equal(weights.layer("model.stacked", n), STACKED[n]) for n in range(3)] == [True] * 3


def test_torchs_own_reader_agrees(folder: Path) -> None:
    state = {"model.stacked": torch.zeros(3, 4, 2), "model.whole": torch.zeros(3, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert torch.equal(state["model.stacked"], STACKED) and torch.equal(state["model.whole"], WHOLE)


def test_chunks_are_taken_one_at_a_time_and_views_are_not_stored_whole(tmp_path: Path) -> None:
    large = torch.zeros(1000, 1000)

    def chunks() -> Any:
        for layer in range(4):
            if layer:
                written = (tmp_path / "w" / "__0_0.distcp").stat().st_size
                assert written >= (layer - 1) * 4000  # the earlier layers are on the disk (the last may be buffered)
            yield Chunk("a", large[layer], layer, 4)

    write_weights(tmp_path / "w", chunks())
    assert (tmp_path / "w" / "__0_0.distcp").stat().st_size < 4 * (4000 + 2000)


def test_another_layout_of_chunks_is_put_together(tmp_path: Path) -> None:
    """As tensor-parallel ranks save: each half of the columns in a chunk of its own."""
    halves = {"left": STACKED[:, :, :1], "right": STACKED[:, :, 1:]}
    path = tmp_path / "w"
    write_weights(path, [Chunk(name, half) for name, half in halves.items()])
    metadata: Any = check_metadata_pickle(path)
    entry, data = metadata.state_dict_metadata["left"], metadata.storage_data
    chunks = [ChunkStorageMetadata(torch.Size([0, 0, n]), torch.Size([3, 4, 1])) for n in (0, 1)]
    storage = {
        MetadataIndex("t", chunks[n].offsets): data[MetadataIndex(name, [0, 0, 0])] for n, name in enumerate(halves)
    }
    entry.size, entry.chunks = STACKED.shape, chunks
    (path / ".metadata").write_bytes(pickle.dumps(Metadata({"t": entry}, storage_data=storage)))
    weights = read_weights(path)
    assert torch.equal(weights["t"], STACKED) and torch.equal(weights.layer("t", 1), STACKED[1])


@pytest.mark.parametrize(
    ("chunks", "match"),
    [
        ([Chunk("a", torch.ones(2), 0, 2)], "1 of 2 layers"),
        ([Chunk("a", torch.ones(2), 0, 2), Chunk("a", torch.ones(2), 0, 2)], "written twice"),
        ([Chunk("a", torch.ones(2)), Chunk("a", torch.ones(2))], "written twice"),
        ([Chunk("a", torch.ones(2), 0, 2), Chunk("a", torch.ones(3), 1, 2)], "one shape and one dtype"),
        ([Chunk("a", torch.ones(2), 0, 2), Chunk("a", torch.ones(2).half(), 1, 2)], "one shape and one dtype"),
    ],
)
def test_incomplete_and_uneven_stacks_are_refused(tmp_path: Path, chunks: list[Chunk], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        write_weights(tmp_path / "w", chunks)


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    metadata = check_metadata_pickle(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_an_index_that_lies_about_a_tensor(folder: Path) -> None:
    edit(folder, lambda m: setattr(m.state_dict_metadata["model.whole"].properties, "dtype", torch.float16))
    with pytest.raises(CheckpointError, match="not the tensor that the index promises"):
        read_weights(folder)["model.whole"]


def test_a_chunk_that_the_index_forgot(folder: Path) -> None:
    edit(folder, lambda m: m.state_dict_metadata["model.stacked"].chunks.pop())
    with pytest.raises(CheckpointError, match="16 of 24 values"):
        read_weights(folder)["model.stacked"]


def test_a_checkpoint_of_another_kind_names_the_remedy_where_only_torch_dist_will_do(folder: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match=r"kind 'zarr' .*convert_gpt_nemo_to_mcore\.py"):
        check_metadata_pickle(folder)
