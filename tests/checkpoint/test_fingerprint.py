"""The hash that names a set of weights: the same for the same tensors, another for any change of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.fingerprint import weights_hash
from nemo_dpo.checkpoint.weights import Chunk, write_weights
from tests.support.ranks import run_ranks

NORM, FC1 = "model.decoder.final_layernorm.weight", "model.decoder.layers.mlp.linear_fc1.weight"
PLAIN = "model.decoder.layers.0.odd.weight"  # a layer of its own is no stack
Tensors = dict[str, Tensor]


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        NORM: torch.randn(6, generator=generator),
        FC1: torch.randn(3, 4, 6, generator=generator).to(torch.bfloat16),
        PLAIN: torch.randn(2, 2, generator=generator),
        "model.scale": torch.tensor(2.0),
    }


def write(folder: Path, values: Tensors, *, whole: bool = False) -> Path:
    """The stack cut into layers, written backwards; or in one piece."""
    chunks = []
    for name, tensor in values.items():
        if name == FC1 and not whole:
            chunks += [Chunk(name, tensor[layer], layer, len(tensor)) for layer in reversed(range(len(tensor)))]
        else:
            chunks.append(Chunk(name, tensor))
    write_weights(folder, chunks)
    return folder


def test_the_same_tensors_in_other_pieces_and_order(tmp_path: Path) -> None:
    values = tensors()
    cut = weights_hash(write(tmp_path / "cut", values))
    assert cut == weights_hash(write(tmp_path / "whole", dict(reversed(values.items())), whole=True))
    assert len(cut) == 64


@pytest.mark.parametrize("name", ["model.embedding.word_embeddings.weight", "model.output_layer.weight"])
def test_padding_of_the_vocabulary_is_left_out(tmp_path: Path, name: str) -> None:
    """As an export pads it that was made at another tensor-parallel size."""
    rows = torch.randn(5, 3)
    rows[2] = 0  # a token may be zero

    def hash_of(*more: torch.Tensor, name: str = name) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return weights_hash(write(folder, {name: torch.cat([rows, *more])}))

    assert hash_of() == hash_of(torch.zeros(3, 3)) == hash_of(torch.zeros(1, 3))
    assert len({hash_of(), hash_of(torch.ones(1, 3)), hash_of(torch.zeros(1, 3), torch.ones(1, 3))}) == 3
    other = "model.decoder.final_layernorm.weight"
    assert hash_of(name=other) != hash_of(torch.zeros(3, 3), name=other)


def hash_of_rank(_rank: int, folder: Path) -> str:
    return weights_hash(folder)


@pytest.mark.parametrize("world", [1, 4])
def test_the_same_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    """On 4 ranks with 6 pieces to hash."""
    folder = write(tmp_path / "weights", tensors())
    (tmp_path / "ranks").mkdir()
    assert run_ranks(world, hash_of_rank, tmp_path / "ranks", folder) == [weights_hash(folder)] * world


def refusal_of_rank(rank: int, folder: Path) -> str:
    """Rank 1 alone sees a folder without weights."""
    with pytest.raises(CheckpointError) as caught:
        weights_hash(folder / "absent" if rank == 1 else folder)
    return str(caught.value)


def test_a_folder_that_one_rank_cannot_read_is_refused_on_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights", tensors())
    (tmp_path / "ranks").mkdir()
    messages = run_ranks(2, refusal_of_rank, tmp_path / "ranks", folder)
    assert messages[0] == messages[1]


def nudge(values: Tensors) -> Tensors:
    last = values[NORM].clone()
    last[-1] = torch.nextafter(last[-1], torch.tensor(10.0))
    return values | {NORM: last}


CHANGES: dict[str, Callable[[Tensors], Tensors]] = {
    "one bit": nudge,
    "two layers exchanged": lambda values: values | {FC1: values[FC1].flip(0)},
    "dtype": lambda values: values | {FC1: values[FC1].float()},
    "shape": lambda values: values | {PLAIN: values[PLAIN].view(4, 1)},
    "name": lambda values: {name.replace("scale", "gain"): tensor for name, tensor in values.items()},
    "one tensor less": lambda values: {name: tensor for name, tensor in values.items() if name != PLAIN},
    "two tensors exchanged": lambda values: values | {PLAIN: values["model.scale"], "model.scale": values[PLAIN]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_another_hash(tmp_path: Path, change: str) -> None:
    before = weights_hash(write(tmp_path / "before", tensors()))
    assert before != weights_hash(write(tmp_path / "after", CHANGES[change](tensors())))
