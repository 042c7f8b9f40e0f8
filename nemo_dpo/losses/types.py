"""What a loss sees and what it returns. P is the number of pairs of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class ResponseStats:
    """Columns of one side (chosen or rejected) of P pairs, each [P]."""

    logps: Tensor  # Σ_t log π_θ over the response's tokens, float32 with gradient
    ref_logps: Tensor  # Σ_t log π_ref, float32
    tokens: Tensor  # number of response tokens, at least 1
    reward: Tensor  # ground-truth reward, float32

    @property
    def log_ratio(self) -> Tensor:
        """r = log π_θ − log π_ref, [P]: the implicit reward before β."""
        return self.logps - self.ref_logps

    def per_token(self) -> ResponseStats:
        """The same responses with log-probs averaged over their tokens instead of summed."""
        return replace(self, logps=self.logps / self.tokens, ref_logps=self.ref_logps / self.tokens)


@dataclass(frozen=True)
class PairStats:
    """P pairs. A loss that needs more per response adds a column to ResponseStats."""

    chosen: ResponseStats
    rejected: ResponseStats

    @property
    def margin(self) -> Tensor:
        """δ = r_chosen − r_rejected, [P]."""
        return self.chosen.log_ratio - self.rejected.log_ratio

    @property
    def reward_gap(self) -> Tensor:
        """g_chosen − g_rejected, [P]: the ground truth's margin, unscaled."""
        return self.chosen.reward - self.rejected.reward

    def per_token(self) -> PairStats:
        """Both sides with log-probs averaged over their tokens."""
        return PairStats(self.chosen.per_token(), self.rejected.per_token())


@dataclass(frozen=True)
class BatchContext:
    """What depends on the whole global batch rather than on a pair. Nothing yet: no loss here needs any."""


@dataclass(frozen=True)
class LossConstants:
    """The constants of the preference losses' formulas."""

    beta: float  # β > 0, the strength of the pull towards the reference
    gt_reward_scale: float = 1.0  # η: Δ = η · (g_chosen − g_rejected)


class LossSum(NamedTuple):
    """A loss over a micro-batch. Nobody divides here: sums and weights add up over micro-batches and ranks first."""

    sum: Tensor  # scalar, Σ over pairs
    weight: Tensor  # scalar of the sum's dtype, not negative: what the all-reduced sum is to be divided by


PreferenceLoss = Callable[[PairStats, BatchContext, LossConstants], LossSum]


def sum_over_pairs(losses: Tensor) -> LossSum:
    """[P] losses, every pair weighing 1. P = 0 gives zeros that still hang on the graph."""
    return LossSum(losses.sum(), losses.new_full((), len(losses)))
