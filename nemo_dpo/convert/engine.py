"""Run a family table over weights, in either direction, one layer's parameter at a time.

Before the first tensor is read, the names on both sides are compared with the table: none may be left over or missing.
Every tensor is checked against the shape that the config implies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.weights import Chunk, Weights
from nemo_dpo.convert.rules import Dims, PaddedVocab, Param, Rule, Table

PREFIX = "model."


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
    _check_source_names(table, dims, source)
    _check_extras(table, dims, source)
    for rule, layer in _progress(_steps(table.rules, dims), "to .nemo"):
        parts = [_checked(source, param, layer, dims) for param in rule.hf]
        tensor = rule.pack(_of_one_dtype(parts, dtype, rule), dims)
        yield Chunk(PREFIX + rule.nemo, tensor, layer, dims.layers if rule.per_layer else 0)


def to_hf(table: Table, dims: Dims, weights: Weights, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Stored megatron-core tensors → (Hugging Face name, tensor), contiguous; the arguments as for `to_chunks`."""
    _check_stored(table, dims, weights)
    for rule, layer in _progress(_steps(table.rules, dims), "to Hugging Face"):
        name = PREFIX + rule.nemo
        tensor = weights[name] if layer is None else weights.layer(name, layer)
        for param, part in zip(rule.hf, rule.unpack(tensor, dims), strict=True):
            yield _name(param, layer), part.to(dtype or part.dtype).contiguous()
    kept = weights.dtype(PREFIX + table.rules[0].nemo)
    for param in table.zeros:
        for layer in _layers(param, dims):
            yield _name(param, layer), torch.zeros(param.shape(dims), dtype=dtype or kept)


def _layers(param: Param, dims: Dims) -> list[int | None]:
    return list(range(dims.layers)) if "{layer}" in param.name else [None]


def _steps(rules: tuple[Rule, ...], dims: Dims) -> list[tuple[Rule, int | None]]:
    return [(rule, layer) for rule in rules for layer in _layers(rule.hf[0], dims)]


def _name(param: Param, layer: int | None) -> str:
    return param.name.format(layer=layer)


def _progress(steps: list[tuple[Rule, int | None]], title: str) -> Iterator[tuple[Rule, int | None]]:
    yield from tqdm(steps, desc=title, unit="tensor", disable=None, leave=False)  # None: no bar without a terminal


def _check_source_names(table: Table, dims: Dims, source: Mapping[str, Tensor]) -> None:
    params = [param for rule in table.rules for param in rule.hf] + list(table.zeros)
    wanted = {_name(param, layer) for param in params for layer in _layers(param, dims)}
    missing = sorted(wanted - set(source))
    unknown = sorted(name for name in set(source) - wanted - set(table.tied) if not name.endswith(table.derived))
    if missing or unknown:
        raise CheckpointError(
            f"the weights do not fit the family's table: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}; check that config.json belongs to these weights"
        )


def _check_extras(table: Table, dims: Dims, source: Mapping[str, Tensor]) -> None:
    """What is not stored must be known to be derivable, or the export would silently differ."""
    for param in table.zeros:
        for layer in _layers(param, dims):
            if _checked(source, param, layer, dims).any():
                raise CheckpointError(f"{_name(param, layer)} is not zero; megatron-core has no place for it")
    for name, original in table.tied.items():
        if name in source and not torch.equal(source[name], source[original]):
            raise CheckpointError(f"{name} differs from {original}, although config.json says that they are tied")


def _checked(source: Mapping[str, Tensor], param: Param, layer: int | None, dims: Dims) -> Tensor:
    name, shape = _name(param, layer), param.shape(dims)
    tensor = source[name]
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {list(tensor.shape)}, config.json implies {list(shape)}")
    return tensor


def _of_one_dtype(parts: list[Tensor], dtype: torch.dtype | None, rule: Rule) -> list[Tensor]:
    found = sorted({str(part.dtype) for part in parts})
    if dtype is None and len(found) > 1:
        raise CheckpointError(f"{rule.nemo} is made of {', '.join(found)}; set the precision to convert to")
    return [part.to(dtype or part.dtype) for part in parts]


def _check_stored(table: Table, dims: Dims, weights: Weights) -> None:
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
