"""What readers of checkpoints have in common, whichever files they read: names of parameters, access to them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping

import torch

from nemo_dpo.checkpoint import CheckpointError

# What precedes or replaces a name without changing what it names: the half-precision wrapper (megatron_amp_O2), and the
# norms of megatron-core's own layers, which Transformer Engine has inside the linear layer behind them.
_SPELLINGS = (
    (re.compile(r"^model\.module\."), "model."),
    (
        re.compile(r"^(model\.decoder\.layers(?:\.\d+)?)\.input_layernorm\."),
        r"\1.self_attention.linear_qkv.layer_norm_",
    ),
    (re.compile(r"^(model\.decoder\.layers(?:\.\d+)?)\.pre_mlp_layernorm\."), r"\1.mlp.linear_fc1.layer_norm_"),
)
_ROUTER = ".mlp.router."  # of layers with experts, before which the norm is a module of its own in either spelling


def plain_names(names: Iterable[str], source: object) -> dict[str, str]:
    """Plain name → the one of `names` that it is; a CheckpointError about `source` where two are one parameter.

    Plain is the spelling of Transformer Engine's layers, without a precision wrapper.
    """
    stored = list(names)
    spellings = _SPELLINGS[:-1] if any(_ROUTER in name for name in stored) else _SPELLINGS
    found: dict[str, str] = {}
    for name in stored:
        plain = name
        for pattern, replacement in spellings:
            plain = pattern.sub(replacement, plain)
        if (first := found.setdefault(plain, name)) != name:
            raise CheckpointError(f"{source} holds a parameter under two names, {first} and {name}")
    return found


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a distributed checkpoint by key, read when asked for; other objects in it are left out."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter, `[layers, …]` if stacked; reads no data."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """dtype of the parameter; reads no data."""

    @abstractmethod
    def layer(self, name: str, index: int) -> torch.Tensor:
        """Layer `index` of a stacked parameter, without the leading dimension; reads the chunks of that layer only."""


class Respelled(Weights):
    """Weights under plain names, whatever their files call them."""

    def __init__(self, stored: Weights, names: Mapping[str, str]) -> None:
        """`names` are those of `plain_names`."""
        self._stored, self._names = stored, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> torch.Size:
        return self._stored.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._names[name])

    def layer(self, name: str, index: int) -> torch.Tensor:
        return self._stored.layer(self._names[name], index)
