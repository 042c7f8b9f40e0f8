"""A frozen copy of the starting weights as the reference policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from nemo_dpo.data.batch import GlobalBatch
from nemo_dpo.parallel.engine import Engine
from nemo_dpo.parallel.response import collect_logps


class Reference(Protocol):
    """Where a reference policy's log-probs come from."""

    def logps(self, batch: GlobalBatch) -> list[Tensor]:
        """Summed log-prob of each response, [N] float32 for each micro-batch.

        Only the last pipeline stage, where the loss is, has them; the others get an empty list.
        """
        ...


class FrozenReference:
    """The policy's modules run on a second set of weights, taken when this object is made.

    There is one model and one code path: at the first step policy and reference log-probs are equal bitwise.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._weights = [[p.detach().clone() for p in chunk.parameters()] for chunk in engine.chunks]

    def logps(self, batch: GlobalBatch) -> list[Tensor]:
        """See `Reference.logps`."""
        with weights_swapped(self._engine.chunks, self._weights):
            return self._engine.forward_only(batch.micro_batches, collect_logps)


@contextlib.contextmanager
def weights_swapped(chunks: Sequence[nn.Module], weights: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """The parameters of `chunks` point at `weights` inside, at their own storage again afterwards; no copies."""
    own = [[p.data for p in chunk.parameters()] for chunk in chunks]
    try:
        _point(chunks, weights)
        yield
    finally:
        _point(chunks, own)


def _point(chunks: Sequence[nn.Module], storages: Sequence[Sequence[Tensor]]) -> None:
    with torch.no_grad():
        for chunk, tensors in zip(chunks, storages, strict=True):
            for parameter, tensor in zip(chunk.parameters(), tensors, strict=True):
                parameter.data = tensor
