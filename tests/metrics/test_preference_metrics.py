"""Metrics against numbers worked out by hand, and that it does not matter how a batch is cut into micro-batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_dpo.config.checkpoint_names import FIGURES
from nemo_dpo.losses import PREFERENCE_LOSSES, BatchContext, LossConstants, Objective, PairStats, ResponseStats
from nemo_dpo.metrics.preference import NUM_SUMS, SUMS, finalize, preference_sums

BETA = 0.25
OBJECTIVE = Objective(PREFERENCE_LOSSES["ipo"], LossConstants(BETA), preference_loss_weight=0.5, sft_loss_weight=2.0)

# Three pairs. r chosen: 2, −1, 0.5; r rejected: 1, 3, 0.5 (a tie).
STATS = PairStats(
    chosen=ResponseStats(
        torch.tensor([-4.0, -6.0, -2.5]), torch.tensor([-6.0, -5.0, -3.0]), torch.tensor([1.0, 2.0, 5.0]), torch.ones(3)
    ),
    rejected=ResponseStats(
        torch.tensor([-7.0, -2.0, -1.5]),
        torch.tensor([-8.0, -5.0, -2.0]),
        torch.tensor([4.0, 1.0, 1.0]),
        torch.zeros(3),
    ),
)
# Σ over each response's tokens of the mean logit
LOGITS = torch.tensor([3.0, 1.0, -8.0]), torch.tensor([2.0, 2.0, 5.0])

# β = 0.25: rewards 0.5, −0.25, 0.125 and 0.25, 0.75, 0.125; the mean of all six is 1.5 / 6.
EXPECTED = {
    # 1/(2β) = 2; δ = 1, −4, 0: 1 + 36 + 4 over 3 pairs
    "preference_loss": 41 / 3,
    "sft_loss": (4 + 6 + 2.5) / 3,
    "loss": 0.5 * 41 / 3 + 2 * 12.5 / 3,
    "acc": 1 / 3,
    "rewards_chosen_mean": 0.375 / 3,
    "rewards_rejected_mean": 1.125 / 3,
    "rewards_all_mean": 0.25,
    # deviations .25, −.5, −.125, 0, .5, −.125: squares .0625 + .25 + .015625 + 0 + .25 + .015625 = .59375, over 6 − 1
    "rewards_all_std": math.sqrt(0.59375 / 5),
    "rewards/chosen": 0.375 / 3,
    "rewards/rejected": 1.125 / 3,
    "rewards/accuracies": 1 / 3,
    "rewards/margins": -0.25,
    "logps/chosen": -12.5 / 3,
    "logps/rejected": -10.5 / 3,
    # over tokens, not over responses: −4 / 8 and 9 / 6
    "logits/chosen": -0.5,
    "logits/rejected": 1.5,
}


def sums_of(rows: slice, objective: Objective = OBJECTIVE, stats: PairStats = STATS) -> Tensor:
    def cut(side: ResponseStats) -> ResponseStats:
        return ResponseStats(side.logps[rows], side.ref_logps[rows], side.tokens[rows], side.reward[rows])

    part = PairStats(cut(stats.chosen), cut(stats.rejected))
    return preference_sums(part, objective(part, BatchContext()), objective.beta, *(logits[rows] for logits in LOGITS))


def test_by_hand() -> None:
    metrics = finalize(sums_of(slice(None)))
    assert tuple(metrics) == FIGURES, "the names that a configuration may rank checkpoints by"
    assert metrics == pytest.approx(EXPECTED, rel=1e-7)  # float32 columns: 7 digits


@pytest.mark.parametrize("cuts", [(0, 1, 2, 3), (0, 2, 3), (0, 0, 1, 3)])
def test_micro_batches_add_up(cuts: tuple[int, ...]) -> None:
    """Also with a micro-batch without pairs. Sums are float64: what is left is the rounding of another order."""
    parts = [sums_of(slice(start, stop)) for start, stop in itertools.pairwise(cuts)]
    assert finalize(torch.stack(parts).sum(0)) == pytest.approx(finalize(sums_of(slice(None))), rel=1e-6)


def test_sums_are_one_plain_vector() -> None:
    stats = replace(STATS, chosen=replace(STATS.chosen, logps=STATS.chosen.logps.clone().requires_grad_()))
    sums = sums_of(slice(None), stats=stats)
    assert (sums.shape, sums.dtype, sums.requires_grad) == ((NUM_SUMS,), torch.float64, False)
    assert len(set(SUMS)) == NUM_SUMS


def test_std_is_the_sample_standard_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, generator=generator) * 3 + 100
    zeros, ones = torch.zeros(50), torch.ones(50)
    stats = PairStats(ResponseStats(chosen, zeros, ones, zeros), ResponseStats(rejected, zeros, ones, zeros))
    sums = preference_sums(stats, OBJECTIVE(stats, BatchContext()), BETA, zeros, zeros)
    expected = BETA * torch.cat((chosen, rejected)).double().std().item()
    # The mean is 30 times the deviation: float64 sums of squares lose 3 of 16 digits.
    assert finalize(sums)["rewards_all_std"] == pytest.approx(expected, rel=1e-10)


def test_at_the_start() -> None:
    """Policy = reference: rewards, margin, deviation and accuracy are exactly 0, not merely small."""
    logps = torch.tensor([-123.456, -7.89])
    side = ResponseStats(logps, logps.clone(), torch.ones(2), torch.zeros(2))
    stats = PairStats(side, side)
    objective = Objective(PREFERENCE_LOSSES["dpo"], LossConstants(0.7))
    metrics = finalize(preference_sums(stats, objective(stats, BatchContext()), 0.7, logps, logps))
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert {metrics[name] for name in metrics if "reward" in name or name == "acc"} == {0.0}


def test_rewards_are_averaged_where_the_loss_averages() -> None:
    objective = replace(OBJECTIVE, preference_average_log_probs=True)
    metrics = finalize(sums_of(slice(None), objective))
    # r / tokens: 2, −0.5, 0.1 and 0.25, 3, 0.5; log-probs stay sums
    assert metrics["rewards/chosen"] == pytest.approx(0.25 * 1.6 / 3, rel=1e-6)
    assert metrics["rewards/rejected"] == pytest.approx(0.25 * 3.75 / 3, rel=1e-6)
    assert metrics["logps/chosen"] == pytest.approx(-12.5 / 3, rel=1e-7)


def test_no_pairs() -> None:
    with pytest.raises(ValueError, match="no preference pair"):
        finalize(torch.zeros(NUM_SUMS, dtype=torch.float64))
