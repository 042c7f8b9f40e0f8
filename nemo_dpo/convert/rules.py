"""The vocabulary of a family table: how one or more Hugging Face parameters become one of megatron-core, and back.

A rule works on one layer at a time and in both directions, and never changes a value. megatron-core's names carry no
layer number, since it stores the layers stacked; Hugging Face's carry `{layer}`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nemo_dpo.lora.spec import Dimensions


def interleave(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Parts [rows, …] → one tensor: the first `groups`-th of each part, then the second of each, and so on."""
    rest = parts[0].shape[1:]
    by_group = [part.reshape(groups, -1, *rest) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, *rest)


def separate(tensor: Tensor, rows: Sequence[int], groups: int) -> tuple[Tensor, ...]:
    """The inverse of `interleave`, for parts of so many rows."""
    rest = tensor.shape[1:]
    by_group = tensor.reshape(groups, -1, *rest)
    parts = by_group.split([count // groups for count in rows], dim=1)
    return tuple(part.reshape(-1, *rest) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Dims(Dimensions):
    """Sizes of a whole model, the ones that shapes are made of."""

    vocab: int
    padded_vocab: int
    positions: int

    @property
    def sizes(self) -> dict[str, int]:
        """The names that a `Param` may use; `q` and `kv` are rows of the query and of the key (or value) projection."""
        return {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "vocab": self.vocab,
            "positions": self.positions,
            "experts": self.experts,
            "head": self.head_channels,
            "q": self.query_rows,
            "kv": self.key_rows,
            "qkv": self.query_rows + 2 * self.key_rows,
        }


@dataclass(frozen=True)
class Param:
    """A Hugging Face parameter.

    Attributes:
        name: with `{layer}` if every layer has one.
        dims: its shape as names of sizes, [outputs, inputs] of a matrix.
        transposed: the file has it the other way round, as GPT-2's Conv1D keeps its weights.
    """

    name: str
    dims: str
    transposed: bool = False

    def shape(self, dims: Dims) -> tuple[int, ...]:
        return tuple(dims.sizes[name] for name in self.dims.split())

    def file_shape(self, dims: Dims) -> tuple[int, ...]:
        """As the file has it."""
        return self.shape(dims)[::-1] if self.transposed else self.shape(dims)

    def turned(self, tensor: Tensor) -> Tensor:
        """File → table, and table → file."""
        return tensor.t() if self.transposed else tensor


@dataclass(frozen=True)
class Rule(ABC):
    """One megatron-core parameter and the Hugging Face parameters that it is made of.

    Attributes:
        nemo: key below `model.`, without a layer number; empty if nothing is stored.
        hf: the parts, in the order that `pack` takes and `unpack` gives.
    """

    nemo: str
    hf: tuple[Param, ...]

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf[0].name

    def stored_shape(self, dims: Dims) -> tuple[int, ...]:
        """Shape of one layer's megatron-core parameter: the parts one below the other."""
        shapes = [param.shape(dims) for param in self.hf]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @abstractmethod
    def pack(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        """Hugging Face → megatron-core."""

    @abstractmethod
    def unpack(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        """megatron-core → Hugging Face."""


@dataclass(frozen=True)
class Copy(Rule):
    """The same tensor under another name."""

    def pack(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return parts[0]

    def unpack(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class FusedQkv(Rule):
    """Query, key and value (weights or biases) in one, interleaved by query group.

    For every group the rows are those of its heads/groups query heads, then of its key head, then of its value head:
    so a tensor-parallel rank's slice of rows holds whole groups.
    """

    def pack(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return interleave(parts, dims.query_groups)

    def unpack(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        attention, kv = dims.sizes["q"], dims.sizes["kv"]
        return separate(tensor, (attention, kv, kv), dims.query_groups)


@dataclass(frozen=True)
class StackedQkv(Rule):
    """Query above key above value in one Hugging Face parameter; megatron-core's is interleaved as in `FusedQkv`."""

    def pack(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return interleave(parts[0].split(self._rows(dims)), dims.query_groups)

    def unpack(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return (torch.cat(separate(tensor, self._rows(dims), dims.query_groups)),)

    @staticmethod
    def _rows(dims: Dims) -> list[int]:
        sizes = dims.sizes
        return [sizes["q"], sizes["kv"], sizes["kv"]]


@dataclass(frozen=True)
class GatedMlp(Rule):
    """Gate above up, as megatron-core's gated linear unit halves its input: activation(first half) × second half."""

    def pack(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return torch.cat(tuple(parts))

    def unpack(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return tensor.chunk(2)


@dataclass(frozen=True)
class PerExpert(Rule):
    """One rule for every expert, stacked: [experts, …].

    Attributes:
        hf: the parts of expert 0, then those of expert 1, and so on.
        each: the rule of one expert.
    """

    each: Rule

    @classmethod
    def of(cls, each: Rule, experts: int) -> PerExpert:
        """`each`, whose parts have `{expert}` in their names, for so many."""
        parts = tuple(
            replace(param, name=param.name.replace("{expert}", str(number)))
            for number in range(experts)
            for param in each.hf
        )
        return cls(each.nemo, parts, each)

    def stored_shape(self, dims: Dims) -> tuple[int, ...]:
        return (len(self.hf) // len(self.each.hf), *self.each.stored_shape(dims))

    def pack(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        stack, each = parts[0].new_empty(self.stored_shape(dims)), len(self.each.hf)
        for number in range(len(stack)):
            stack[number] = self.each.pack(parts[number * each : (number + 1) * each], dims)
        return stack

    def unpack(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return tuple(part for expert in tensor for part in self.each.unpack(expert, dims))


@dataclass(frozen=True)
class PaddedVocab(Rule):
    """Rows of zeros below the vocabulary, so that it divides among tensor-parallel ranks; cut off on the way back."""

    def stored_shape(self, dims: Dims) -> tuple[int, ...]:
        return (dims.padded_vocab, *self.hf[0].shape(dims)[1:])

    def pack(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        padded = parts[0].new_zeros(self.stored_shape(dims))
        padded[: dims.vocab] = parts[0]
        return padded

    def unpack(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return (tensor[: dims.vocab],)


@dataclass(frozen=True)
class Table:
    """All parameters of one model.

    Attributes:
        rules: every parameter that megatron-core has; each Hugging Face name in at most one of them.
        zeros: Hugging Face parameters that megatron-core cannot hold: all zero on import, written as zeros on export.
        tied: Hugging Face name → the parameter that it may only repeat; checked on import, left out on export.
        derived: endings of Hugging Face names that hold nothing of their own, such as RoPE's frequencies.
        renamed: (regular expression, replacement) of names that some files have, such as those of other versions of
            transformers → the table's.
        config: the file whose sizes the source's tensors must have, for messages.
    """

    rules: tuple[Rule, ...]
    zeros: tuple[Param, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    config: str = "config.json"
