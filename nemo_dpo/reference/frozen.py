"""A frozen copy of the starting weights as the reference policy."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from nemo_dpo.data.batch import GlobalBatch
from nemo_dpo.parallel.engine import Evaluator, weights_swapped
from nemo_dpo.parallel.response import collect_logps


class Reference(Protocol):
    """Where a reference policy's log-probs come from."""

    def logps(self, batch: GlobalBatch) -> list[Tensor]:
        """Summed log-prob of each response, [N] float32 for each micro-batch.

        Only the last pipeline stage, where the loss is, has them; the others get an empty list.
        """
        ...


class FrozenReference:
    """The policy's modules run on a second set of what is trained, taken when this object is made.

    There is one model and one code path: at the first step policy and reference log-probs are equal bitwise. The copy
    of a model on a GPU waits in pinned host memory and is on the device during its pass only, when no activations are.
    """

    def __init__(self, engine: Evaluator) -> None:
        self._engine = engine
        on_host = engine.groups.device.type == "cpu"
        self._weights = [p.detach().clone() if on_host else p.detach().cpu().pin_memory() for p in engine.trainable]

    def logps(self, batch: GlobalBatch) -> list[Tensor]:
        """See `Reference.logps`."""
        weights = [weight.to(self._engine.groups.device, non_blocking=True) for weight in self._weights]
        with weights_swapped(self._engine.trainable, weights):
            return self._engine.forward_only(batch.micro_batches, collect_logps)
