"""What each rank does in test_weight.py: a step of an objective whose pairs do not weigh 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.model.model_cases import BETA, SIZES, build, random_batches, reference_logps


def step_of_rank(_rank: int, nemo: Path, layout: Any, weight: float) -> dict[str, Any]:
    """Loss as logged (last stage) and gradients of DPO with `weight` a pair."""
    from nemo_dpo.losses import BatchContext, LossConstants, LossSum, Objective, PairStats
    from nemo_dpo.losses.preference import dpo
    from nemo_dpo.metrics.preference import finalize
    from nemo_dpo.training.step import objective_step

    def weighted(stats: PairStats, ctx: BatchContext, constants: LossConstants) -> LossSum:
        loss = dpo(stats, ctx, constants)
        return LossSum(loss.sum, weight * loss.weight)

    engine = build(nemo, layout)
    batches = random_batches(SIZES, multiple=layout.tp)
    objective = Objective(weighted, LossConstants(BETA))
    outcomes = engine.forward_backward(batches, objective_step(objective, reference_logps(batches)))
    gradients: list[Tensor] = [p.main_grad.clone() for chunk in engine.chunks for p in chunk.parameters()]
    loss = finalize(torch.stack([outcome.sums for outcome in outcomes]).sum(0))["loss"] if outcomes else None
    return {"loss": loss, "gradients": gradients}
