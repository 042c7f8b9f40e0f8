"""Two checkpoints compared parameter by parameter, to the bit, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.fingerprint import Piece, pieces
from nemo_dpo.checkpoint.weights import Chunk, read_weights
from nemo_dpo.convert.family import to_model_config
from nemo_dpo.convert.opened import Opened

BLOCK = 2**22  # values compared at a time: what a comparison needs in memory besides the two tensors
# Keys of model_config.yaml that say nothing about what the model computes.
IMMATERIAL = {
    "attention_dropout", "encoder_seq_length", "ffn_dropout", "hidden_dropout", "init_method_std",
    "make_vocab_size_divisible_by", "moe_aux_loss_coeff", "moe_router_load_balancing_type", "transformer_engine",
}  # fmt: skip


class Place(NamedTuple):
    """Where two tensors differ most: by how much, at which index, between which values."""

    amount: float
    at: tuple[int, ...]
    left: float
    right: float


class Difference(NamedTuple):
    """How one parameter differs; `place` is None where shape or dtype or name do, not values."""

    name: str
    what: str
    place: Place | None = None


@dataclass
class Comparison:
    """What was found.

    Attributes:
        compared: number of parameters whose values were compared.
        config: keys of model_config.yaml with both values.
        parameters: those that differ.
    """

    compared: int = 0
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    parameters: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.config and not self.parameters

    @property
    def largest(self) -> Difference | None:
        """The parameter with the largest difference of a value."""
        placed = [difference for difference in self.parameters if difference.place]
        return max(placed, key=lambda difference: difference.place.amount if difference.place else 0.0, default=None)


def compare(left: Opened, right: Opened, dtype: torch.dtype | None = None) -> Comparison:
    """Compare configurations and all parameters; in memory are one parameter of each at a time.

    Rows that pad the vocabulary take no part. Where `dtype` is given, both are converted to it first.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    found = Comparison(config=config_differences(left, right))
    mine, theirs = ({entry.name: entry for entry in side.entries(dtype)} for side in (left, right))
    found.parameters += [Difference(name, "only in the first") for name in mine if name not in theirs]
    found.parameters += [Difference(name, "only in the second") for name in theirs if name not in mine]
    common = [name for name in mine if name in theirs and mine[name].shape == theirs[name].shape]
    found.parameters += [
        Difference(name, f"shapes {list(mine[name].shape)} and {list(theirs[name].shape)}")
        for name in mine
        if name in theirs and mine[name].shape != theirs[name].shape
    ]
    for name, a, b in _pairs(left, right, set(common), dtype):
        found.compared += 1
        if difference := _difference(name, a, b):
            found.parameters.append(difference)
        del a, b  # or they would live on while the next ones are read
    return found


def check_same(left: Opened, right: Opened, dtype: torch.dtype | None) -> None:
    """Refuse `right`, which was just written from `left` in `dtype`, unless every parameter has arrived.

    Raises:
        CheckpointError: one has not.
    """
    if left.entries(dtype) != right.entries(None):
        raise CheckpointError(f"{right.path}: names, shapes or dtypes are not those that were to be written")
    for name, a, b in _pairs(left, right, None, dtype):
        _check_equal(name, a, b, left.path, right.path)
        del a, b


def check_written(written: Path, chunks: Iterable[Chunk], source: Path) -> None:
    """Refuse the archive `written` unless it holds `chunks`, which are made of `source` again, and nothing else.

    Raises:
        CheckpointError: it does not.
    """
    with archive.open_parts(written, written.parent) as (_, stored):
        weights = read_weights(stored)
        left = {Piece(name, layer) for name, layer in pieces(weights)}
        for chunk in chunks:
            piece = Piece(chunk.name, chunk.layer)
            if piece not in left:
                raise CheckpointError(f"{written}: lacks {chunk.name}, layer {chunk.layer}, which was to be written")
            left.remove(piece)
            found = weights[chunk.name] if chunk.layer is None else weights.layer(chunk.name, chunk.layer)
            _check_equal(chunk.name, chunk.tensor, found, source, written)
            del chunk, found  # or they would live on while the next ones are made
        if left:
            raise CheckpointError(f"{written}: holds {min(left).name}, which was not to be written")


def _check_equal(name: str, expected: Tensor, found: Tensor, source: Path, written: Path) -> None:
    if expected.shape != found.shape:
        raise CheckpointError(
            f"{written}: {name} has shape {list(found.shape)}, {list(expected.shape)} was to be written"
        )
    if difference := _difference(name, expected, found):
        raise CheckpointError(
            f"{written}: {name} was read back different from {source} ({difference.what}); the disk or the memory of "
            "this host is not to be trusted, or the converter is wrong"
        )


def config_differences(left: Opened, right: Opened) -> dict[str, tuple[Any, Any]]:
    """Keys of model_config.yaml that decide what the model computes, where both differ → both values."""
    if left.family is not right.family:
        return {"model_type": (left.family.model_type, right.family.model_type)}
    mine, theirs = (to_model_config(side.family, side.hf_config(), {}) for side in (left, right))
    names = sorted((mine.keys() | theirs.keys()) - IMMATERIAL)
    return {name: (mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)}


def _pairs(
    left: Opened, right: Opened, names: set[str] | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Both tensors of each of `names`, or of all; the two tables have them in one order."""
    lefts = _wanted(left.tensors(dtype, "compare"), names)
    rights = _wanted(right.tensors(dtype, ""), names)
    for name, a in lefts:
        other, b = next(rights)
        if name != other:
            raise CheckpointError(f"{left.path} and {right.path} cannot be compared: {name} meets {other}")
        yield name, a, b
        del a, b


def _wanted(stream: Iterator[tuple[str, Tensor]], names: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        if names is None or name in names:
            yield name, tensor
        del tensor


def _difference(name: str, a: Tensor, b: Tensor) -> Difference | None:
    """None if both have the same bits."""
    if a.dtype == b.dtype and all(torch.equal(_bits(x), _bits(y)) for x, y in _blocks(a, b)):
        return None
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in (a, b)}
    count, place = _largest(a, b)
    what = f"{count} of {a.numel()} values" if len(kinds) == 1 else " and ".join(sorted(kinds))
    return Difference(name, what, place)


def _largest(a: Tensor, b: Tensor) -> tuple[int, Place]:
    """(number of values that differ, where most); NaN is infinitely far from everything."""
    count, largest, place = 0, -1.0, 0
    for number, (x, y) in enumerate(_blocks(a, b)):
        wide = x.double(), y.double()
        apart = (wide[0] - wide[1]).abs().nan_to_num(nan=torch.inf)
        same = wide[0] == wide[1] if a.dtype != b.dtype else (_bits(x) == _bits(y)).reshape(len(x), -1).all(1)
        apart[same] = -1.0
        count += int((~same).sum())
        if (most := float(apart.max())) > largest:
            largest, place = most, number * BLOCK + int(apart.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), a.shape))
    return count, Place(max(largest, 0.0), at, float(a[at]), float(b[at]))


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(a.reshape(-1).split(BLOCK), b.reshape(-1).split(BLOCK), strict=True)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
