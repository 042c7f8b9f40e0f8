"""Run a family table over weights, in either direction, one layer's parameter at a time.

Before the first tensor is read, the names on both sides are compared with the table: none may be left over or missing.
Every tensor is checked against the shape that the config implies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.weights import Chunk, Weights
from nemo_dpo.convert.rules import Dims, PaddedVocab, Param, Rule, Table

PREFIX = "model."
Step = TypeVar("Step")


def to_chunks(table: Table, dims: Dims, source: Mapping[str, Tensor], dtype: torch.dtype | None) -> Iterator[Chunk]:
    """Hugging Face tensors → chunks for `checkpoint.weights.write_weights`.

    Args:
        table: the family's table for this model.
        dims: the model's sizes.
        source: tensors by Hugging Face name; each is asked for once, so it may read lazily.
        dtype: converts to it; None keeps what the source has.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape, or one that must be zero or tied is not.
    """
    source = Renamed(source, table.renamed)
    check_source(table, dims, source)
    _check_extras(table, dims, source)
    for rule, layer in progress(_steps(table.rules, dims), "to .nemo"):
        num_layers = dims.layers if rule.per_layer else 0
        yield Chunk(PREFIX + rule.nemo, _packed(rule, layer, dims, source, dtype, table.config), layer, num_layers)


def to_hf(
    table: Table, dims: Dims, weights: Weights, dtype: torch.dtype | None, title: str = "to Hugging Face"
) -> Iterator[tuple[str, Tensor]]:
    """Stored megatron-core tensors → (Hugging Face name, tensor), contiguous; the arguments as for `to_chunks`."""
    check_stored(table, dims, weights)
    for rule, layer in progress(_steps(table.rules, dims), title):
        yield from _unpacked(rule, layer, dims, weights, dtype)
    kept = weights.dtype(PREFIX + table.rules[0].nemo)
    for param in table.zeros:
        for layer in _layers(param, dims):
            yield _name(param, layer), torch.zeros(param.file_shape(dims), dtype=dtype or kept)


def hf_parameters(table: Table, dims: Dims) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(Hugging Face name, shape, key of the stored parameter that has its dtype), in the order of `to_hf`."""
    for rule, layer in _steps(table.rules, dims):
        for param in rule.hf:
            yield _name(param, layer), param.file_shape(dims), PREFIX + rule.nemo
    for param in table.zeros:
        for layer in _layers(param, dims):
            yield _name(param, layer), param.file_shape(dims), PREFIX + table.rules[0].nemo


# Memory: a tensor lives on while a name of a running function refers to it. So the two below hold none that they have
# handed out, and nothing of the step before is left when the next one reads.
def _packed(
    rule: Rule, layer: int | None, dims: Dims, source: Mapping[str, Tensor], dtype: torch.dtype | None, config: str
) -> Tensor:
    parts = [
        param.turned(
            converted(checked(source, _name(param, layer), param.file_shape(dims), config), dtype)
        ).contiguous()
        for param in rule.hf
    ]
    found = sorted({str(part.dtype) for part in parts})
    if len(found) > 1:
        raise CheckpointError(f"{rule.nemo} is made of {', '.join(found)}; set the precision to convert to")
    return rule.pack(parts, dims)


def _unpacked(
    rule: Rule, layer: int | None, dims: Dims, weights: Weights, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for param, part in zip(rule.hf, rule.unpack(_stored(rule, layer, weights), dims), strict=True):
        yield _name(param, layer), param.turned(converted(part, dtype)).contiguous()


def _stored(rule: Rule, layer: int | None, weights: Weights) -> Tensor:
    name = PREFIX + rule.nemo
    return weights[name] if layer is None else weights.layer(name, layer)


def converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` in `dtype`; None keeps its own."""
    return tensor.to(dtype or tensor.dtype)


class Renamed(Mapping[str, Tensor]):
    """`source` under the table's names; `patterns` are those of `Table.renamed`."""

    def __init__(self, source: Mapping[str, Tensor], patterns: Sequence[tuple[str, str]]) -> None:
        self._source = source
        self._names: dict[str, str] = {}
        for name in source:
            own = name
            for pattern, replacement in patterns:
                own = re.sub(pattern, replacement, own)
            if own in self._names:
                raise CheckpointError(f"{name} and {self._names[own]} are two names of one parameter")
            self._names[own] = name

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._names[name]]

    def original(self, name: str) -> str:
        """The name in `source`."""
        return self._names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _layers(param: Param, dims: Dims) -> list[int | None]:
    return list(range(dims.layers)) if "{layer}" in param.name else [None]


def _steps(rules: tuple[Rule, ...], dims: Dims) -> list[tuple[Rule, int | None]]:
    """What has no layer, then layer by layer, as Hugging Face's files are laid out."""
    steps = [(rule, layer) for rule in rules for layer in _layers(rule.hf[0], dims)]
    return sorted(steps, key=lambda step: -1 if step[1] is None else step[1])


def _name(param: Param, layer: int | None) -> str:
    return param.name.format(layer=layer)


def progress(steps: Sequence[Step], title: str) -> Iterator[Step]:
    """`steps` with a bar that says `title`, where there is a terminal; an empty one asks for no bar."""
    off = None if title else True  # None: off without a terminal
    yield from tqdm(steps, desc=title, unit="tensor", disable=off, leave=False)


def check_source(table: Table, dims: Dims, source: Mapping[str, Tensor]) -> None:
    """Refuse Hugging Face names that are not those of the table."""
    if dims.layers > len(source):  # before their names are listed
        raise CheckpointError(f"{table.config} says {dims.layers} layers, the weights are {len(source)} tensors")
    params = [param for rule in table.rules for param in rule.hf] + list(table.zeros)
    wanted = {_name(param, layer) for param in params for layer in _layers(param, dims)}
    missing = sorted(wanted - set(source))
    unknown = sorted(name for name in set(source) - wanted - set(table.tied) if not name.endswith(table.derived))
    if missing or unknown:
        raise CheckpointError(
            f"the weights do not fit the family's table: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}; check that {table.config} belongs to these weights"
        )


def _check_extras(table: Table, dims: Dims, source: Mapping[str, Tensor]) -> None:
    """What is not stored must be known to be derivable, or the export would silently differ."""
    for param in table.zeros:
        for layer in _layers(param, dims):
            if checked(source, _name(param, layer), param.file_shape(dims), table.config).any():
                raise CheckpointError(f"{_name(param, layer)} is not zero; megatron-core has no place for it")
    for name, original in table.tied.items():
        if name in source and not torch.equal(source[name], source[original]):
            raise CheckpointError(f"{name} differs from {original}, although {table.config} says that they are tied")


def checked(source: Mapping[str, Tensor], name: str, shape: tuple[int, ...], config: str) -> Tensor:
    """The tensor `name` of `source`, which must have the shape that the file `config` implies."""
    tensor = source[name]
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {list(tensor.shape)}, {config} implies {list(shape)}")
    return tensor


def check_stored(table: Table, dims: Dims, weights: Weights) -> None:
    """Refuse stored weights whose names or shapes are not those of the table."""
    wanted = {PREFIX + rule.nemo: rule for rule in table.rules}
    missing, unknown = sorted(wanted.keys() - set(weights)), sorted(set(weights) - wanted.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the stored weights do not fit the family's table: {len(missing)} missing {missing[:3]}, {len(unknown)} "
            f"unknown {unknown[:3]}; check that model_config.yaml belongs to these weights"
        )
    for name, rule in wanted.items():
        _check_stored_shape(name, rule, dims, weights)


def _check_stored_shape(name: str, rule: Rule, dims: Dims, weights: Weights) -> None:
    stack = (dims.layers,) if rule.per_layer else ()
    shape, expected = tuple(weights.shape(name)), (*stack, *rule.stored_shape(dims))
    if isinstance(rule, PaddedVocab) and shape[0] >= dims.vocab:  # more or less padding: another tensor-parallel size
        expected = (shape[0], *expected[1:])
    if shape != expected:
        raise CheckpointError(f"{name} has shape {list(shape)}, model_config.yaml implies {list(expected)}")
