"""The frozen weights below the trained adapter as the reference policy, alone or with another adapter."""

from __future__ import annotations

from torch import Tensor

from nemo_dpo.data.batch import GlobalBatch
from nemo_dpo.lora.adapters import active
from nemo_dpo.parallel.engine import Evaluator
from nemo_dpo.parallel.response import collect_logps


class AdapterReference:
    """The policy's own modules with another adapter switched on, or with none: no second copy of any weight.

    With none a B of zeros makes policy and reference log-probs equal bitwise at the first step.

    Args:
        name: of a frozen adapter; None is no adapter.
    """

    def __init__(self, engine: Evaluator, name: str | None) -> None:
        self._engine = engine
        self._name = name

    def logps(self, batch: GlobalBatch) -> list[Tensor]:
        """See `Reference.logps`."""
        with active(self._engine.chunks, self._name):
            return self._engine.forward_only(batch.micro_batches, collect_logps)
