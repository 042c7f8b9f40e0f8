"""Two pairs small enough for the losses to be worked out on paper: β ≠ 1, unequal rewards, unequal lengths.

          A chosen  A rejected   B chosen  B rejected
log π        −10        −9          −20       −30
log π_ref    −12        −8          −18       −30.5
r              2        −1           −2         0.5        summed over tokens
tokens         4         2            5         5
r / tokens     0.5      −0.5         −0.4       0.1
g              0.9       0.4          0.2       0.3

δ:  A  2 − (−1) = 3        B  −2 − 0.5 = −2.5          averaged:  A  1     B  −0.5
With β = 0.5:   βδ  A  1.5    B  −1.25                 averaged:  A  0.5   B  −0.25
With η = 2:     Δ   A  2 · (0.9 − 0.4) = 1             B  2 · (0.2 − 0.3) = −0.2
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_dpo.losses import LossConstants, PairStats, ResponseStats

BETA, ETA = 0.5, 2.0
CONSTANTS = LossConstants(beta=BETA, gt_reward_scale=ETA)


def column(*values: float, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def two_pairs() -> PairStats:
    """The table above in float64, with gradients on the policy's log-probs."""
    return PairStats(
        chosen=ResponseStats(column(-10, -20, requires_grad=True), column(-12, -18), column(4, 5), column(0.9, 0.2)),
        rejected=ResponseStats(column(-9, -30, requires_grad=True), column(-8, -30.5), column(2, 5), column(0.4, 0.3)),
    )


def pairs_with(margin: Tensor, reward_gap: Tensor | float = 0.0) -> PairStats:
    """Pairs of one token with the given δ and ground-truth gap: all of both on the chosen side."""
    zeros = torch.zeros_like(margin)
    return PairStats(
        chosen=ResponseStats(margin, zeros, zeros + 1, zeros + reward_gap),
        rejected=ResponseStats(zeros, zeros, zeros + 1, zeros),
    )


def swapped(stats: PairStats) -> PairStats:
    return PairStats(chosen=stats.rejected, rejected=stats.chosen)
