"""The objective: weights, length-averaging switches, the SFT term, and what the configuration offers of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from nemo_dpo.config.limits import LIMITS
from nemo_dpo.losses import PREFERENCE_LOSSES, BatchContext, PairStats, ResponseStats, build_objective
from tests.losses.handmade import BETA, ETA, two_pairs

CONTEXT = BatchContext()


@dataclass(frozen=True)
class Options:
    preference_loss: str = "dpo"
    ref_policy_kl_penalty: float = BETA
    gt_reward_scale: float = ETA
    preference_average_log_probs: bool = False
    sft_average_log_probs: bool = False
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0


def value(stats: PairStats | None = None, **options: Any) -> Any:
    return build_objective(Options(**options))(stats or two_pairs(), CONTEXT)


def test_dpo_alone() -> None:
    # −log σ(1.5) − log σ(−1.25), see handmade.py
    output = value()
    assert output.total.item() == output.preference.item() == pytest.approx(0.2014133 + 1.5019291, rel=1e-6)
    assert (output.sft.item(), output.weight.item()) == (0, 2)
    assert output.chosen_log_ratio.tolist() == [2, -2]
    assert output.rejected_log_ratio.tolist() == [-1, 0.5]


def test_averaged_log_probs() -> None:
    # Averaged: βδ = 0.5 and −0.25. −log σ(0.5) = .4740770, −log σ(−0.25) = .8259394
    output = value(preference_average_log_probs=True)
    assert output.preference.item() == pytest.approx(0.4740770 + 0.8259394, rel=1e-6)
    assert output.chosen_log_ratio.tolist() == pytest.approx([0.5, -0.4], rel=1e-12)
    assert output.rejected_log_ratio.tolist() == pytest.approx([-0.5, 0.1], rel=1e-12)


def test_averaged_ipo() -> None:
    # δ = 1 and −0.5, 1/(2β) = 1: 0² + 1.5²
    assert value(preference_loss="ipo", preference_average_log_probs=True).preference.item() == pytest.approx(2.25)


@pytest.mark.parametrize(
    ("average", "expected"),
    # log π(chosen) = −10 over 4 tokens and −20 over 5
    [(False, 10 + 20), (True, 2.5 + 4)],
)
@pytest.mark.parametrize("preference_average", [False, True])
def test_sft_has_a_switch_of_its_own(average: bool, expected: float, preference_average: bool) -> None:
    output = value(sft_loss_weight=0.3, sft_average_log_probs=average, preference_average_log_probs=preference_average)
    preference = value(preference_average_log_probs=preference_average).preference.item()
    assert output.sft.item() == pytest.approx(expected, rel=1e-12)
    assert output.preference.item() == preference


def test_weights() -> None:
    # 0.7 · 16.25 + 0.3 · 30; ipo as in test_preference_losses.py
    output = value(preference_loss="ipo", preference_loss_weight=0.7, sft_loss_weight=0.3)
    assert (output.preference.item(), output.sft.item()) == (16.25, 30)
    assert output.total.item() == pytest.approx(20.375, rel=1e-12)


def test_weighted_gradient() -> None:
    stats = two_pairs()
    value(stats, preference_loss="ipo", preference_loss_weight=0.5, sft_loss_weight=0.25).total.backward()
    # chosen: 0.5 · 2 (δ − 1) − 0.25, rejected: −0.5 · 2 (δ − 1), with δ = 3 and −2.5
    assert stats.chosen.logps.grad.tolist() == pytest.approx([2 - 0.25, -3.5 - 0.25], rel=1e-12)
    assert stats.rejected.logps.grad.tolist() == pytest.approx([-2, 3.5], rel=1e-12)


def test_averaged_sft_gradient() -> None:
    stats = two_pairs()
    value(stats, preference_loss_weight=0.0, sft_loss_weight=2.0, sft_average_log_probs=True).total.backward()
    assert stats.chosen.logps.grad.tolist() == pytest.approx([-2 / 4, -2 / 5], rel=1e-12)
    assert stats.rejected.logps.grad is None


def test_a_preference_loss_of_weight_0_is_not_computed() -> None:
    stats = two_pairs()
    stats = replace(stats, rejected=replace(stats.rejected, ref_logps=torch.full((2,), -torch.inf)))
    assert not value(stats).total.isfinite()
    output = value(stats, preference_loss_weight=0.0, sft_loss_weight=1.0)
    assert (output.total.item(), output.preference.item(), output.weight.item()) == (30, 0, 2)


def test_an_sft_term_of_weight_0_is_not_computed() -> None:
    stats = two_pairs()
    stats = replace(stats, chosen=replace(stats.chosen, tokens=torch.zeros(2)))
    assert not value(stats, sft_loss_weight=1.0, sft_average_log_probs=True).total.isfinite()
    assert value(stats, sft_loss_weight=0.0, sft_average_log_probs=True).total.item() == value().total.item()


def test_sums_add_up_over_micro_batches() -> None:
    whole, parts = two_pairs(), [_pair(two_pairs(), number) for number in range(2)]
    options = dict(preference_loss="rpo_bwd_kl", sft_loss_weight=0.3, preference_average_log_probs=True)
    outputs = [value(part, **options) for part in parts]
    for name in ("total", "preference", "sft", "weight"):
        together = sum(getattr(output, name).item() for output in outputs)
        assert together == pytest.approx(getattr(value(whole, **options), name).item(), rel=1e-12)


def test_what_is_logged_carries_no_graph() -> None:
    output = value(sft_loss_weight=1.0)
    assert [tensor.requires_grad for tensor in output] == [True, False, False, False, False, False]


def test_no_pairs() -> None:
    logps = torch.zeros(0, requires_grad=True)
    side = ResponseStats(logps, torch.zeros(0), torch.zeros(0), torch.zeros(0))
    output = value(PairStats(side, side), sft_loss_weight=0.5)
    output.total.backward()
    assert (output.total.item(), output.weight.item(), logps.grad.shape) == (0, 0, (0,))


def test_gt_reward_scale_reaches_the_loss() -> None:
    # (1.5 − 1)² + (−1.25 + 0.2)², as in test_preference_losses.py; η = 1 would give (1.5 − 0.5)² + (−1.25 + 0.1)²
    assert value(preference_loss="rpo_sq").total.item() == pytest.approx(1.3525, rel=1e-12)
    assert value(preference_loss="rpo_sq", gt_reward_scale=1.0).total.item() == pytest.approx(2.3225, rel=1e-12)


def test_beta_is_the_penalty() -> None:
    assert build_objective(Options(ref_policy_kl_penalty=0.37)).beta == 0.37


def test_the_configuration_offers_the_losses_that_there_are() -> None:
    """It names them itself, for it is checked without torch."""
    limit = LIMITS["model.dpo.preference_loss"]
    assert limit.text == f"must be {' or '.join(PREFERENCE_LOSSES)}"
    assert all(limit.passes(name) for name in PREFERENCE_LOSSES)


def _pair(stats: PairStats, number: int) -> PairStats:
    def side(columns: ResponseStats) -> ResponseStats:
        rows = slice(number, number + 1)
        return ResponseStats(columns.logps[rows], columns.ref_logps[rows], columns.tokens[rows], columns.reward[rows])

    return PairStats(side(stats.chosen), side(stats.rejected))
