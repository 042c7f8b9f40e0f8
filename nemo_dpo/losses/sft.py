"""The supervised term that may accompany a preference loss."""

from __future__ import annotations

from nemo_dpo.losses.types import BatchContext, LossSum, PairStats, sum_over_pairs


def sft(stats: PairStats, ctx: BatchContext) -> LossSum:
    """− log π_θ(chosen): keeps the chosen response likely. Knows neither the reference nor the rejected response."""
    return sum_over_pairs(-stats.chosen.logps)
