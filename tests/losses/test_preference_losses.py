"""Each loss against numbers worked out by hand, its derivative, and what it does at its minimum and limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from nemo_dpo.losses import PREFERENCE_LOSSES, BatchContext, LossConstants, PairStats, ResponseStats
from tests.losses.handmade import BETA, CONSTANTS, ETA, pairs_with, swapped, two_pairs

CONTEXT = BatchContext()
EVERY_LOSS = sorted(PREFERENCE_LOSSES)
# Worked in float64 from figures with 7 digits.
DIGITS = dict(rel=1e-6)

# βδ = 1.5, −1.25 and Δ = 1, −0.2 (see handmade.py); σ(1.5) = .8175745, σ(−1.25) = .2227001, σ(1) = .7310586,
# σ(−0.2) = .4501660.
HAND = {
    # −ln .8175745 = .2014133    −ln .2227001 = 1.5019291
    "dpo": (0.2014133, 1.5019291),
    # 1/(2β) = 1: (3 − 1)²    (−2.5 − 1)²
    "ipo": (4.0, 12.25),
    # (1.5 − 1)²    (−1.25 + 0.2)²
    "rpo_sq": (0.25, 1.1025),
    # .7310586 ln(.7310586/.8175745) + .2689414 ln(.2689414/.1824255) = −.0817677 + .1043900
    # .4501660 ln(.4501660/.2227001) + .5498340 ln(.5498340/.7772999) =  .3168224 − .1903579
    "rpo_bwd_kl": (0.0226223, 0.1264645),
    # .8175745 ln(.8175745/.7310586) + .1824255 ln(.1824255/.2689414) =  .0914444 − .0708088
    # .2227001 ln(.2227001/.4501660) + .7772999 ln(.7772999/.5498340) = −.1567342 + .2691088
    "rpo_fwd_kl": (0.0206356, 0.1123746),
}

# dL/d log π(chosen) = dL/dδ; the rejected response's is its negative.
HAND_GRADIENT = {
    # −β σ(−βδ): −.5 · .1824255    −.5 · .7772999
    "dpo": (-0.0912128, -0.3886499),
    # 2 (δ − 1): 2 · 2    2 · (−3.5)
    "ipo": (4.0, -7.0),
    # 2β (βδ − Δ) = βδ − Δ here
    "rpo_sq": (0.5, -1.05),
    # β (σ(βδ) − σ(Δ)): .5 · .0865159    .5 · (−.2274659)
    "rpo_bwd_kl": (0.0432579, -0.1137329),
    # β σ(βδ) σ(−βδ) (βδ − Δ): .5 · .1491465 · .5    .5 · .1731048 · (−1.05)
    "rpo_fwd_kl": (0.0372866, -0.0908800),
}


def test_every_registered_loss_is_worked_by_hand() -> None:
    assert sorted(HAND) == sorted(HAND_GRADIENT) == EVERY_LOSS


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_value(name: str) -> None:
    total, weight = PREFERENCE_LOSSES[name](two_pairs(), CONTEXT, CONSTANTS)
    assert total.item() == pytest.approx(sum(HAND[name]), **DIGITS)
    assert weight.item() == 2


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_gradient(name: str) -> None:
    stats = two_pairs()
    PREFERENCE_LOSSES[name](stats, CONTEXT, CONSTANTS).sum.backward()
    assert stats.chosen.logps.grad.tolist() == pytest.approx(HAND_GRADIENT[name], rel=2e-6)
    assert stats.rejected.logps.grad.tolist() == pytest.approx([-value for value in HAND_GRADIENT[name]], rel=2e-6)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_descent_raises_chosen_and_lowers_rejected_from_the_start(name: str) -> None:
    """At δ = 0, where training starts, with the ground truth in favour of chosen."""
    logps = [torch.tensor([-7.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    chosen, rejected = (ResponseStats(x, x.detach(), torch.ones(1), torch.ones(1)) for x in logps)
    stats = PairStats(chosen, replace(rejected, reward=torch.zeros(1)))
    PREFERENCE_LOSSES[name](stats, CONTEXT, CONSTANTS).sum.backward()
    assert logps[0].grad.item() < 0 < logps[1].grad.item()


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_gradcheck(name: str) -> None:
    # Steps of 1e-6 in float64 leave 1e-9 or so of a central difference's digits; gradcheck's tolerances are wider.
    base = two_pairs()

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        stats = PairStats(
            ResponseStats(chosen, base.chosen.ref_logps, base.chosen.tokens, base.chosen.reward),
            ResponseStats(rejected, base.rejected.ref_logps, base.rejected.tokens, base.rejected.reward),
        )
        return PREFERENCE_LOSSES[name](stats, CONTEXT, CONSTANTS).sum

    assert torch.autograd.gradcheck(loss, (base.chosen.logps, base.rejected.logps))


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_only_the_log_ratio_counts(name: str) -> None:
    """Moving policy and reference together changes nothing."""
    loss, stats = PREFERENCE_LOSSES[name], two_pairs()
    moved = PairStats(_moved(stats.chosen, 5), _moved(stats.rejected, -3))
    there, here = loss(moved, CONTEXT, CONSTANTS).sum, loss(stats, CONTEXT, CONSTANTS).sum
    assert there.item() == pytest.approx(here.item(), rel=1e-12)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_no_pairs(name: str) -> None:
    """A rank without a pair left adds zero, and its backward pass still runs."""
    empty = torch.zeros(0, requires_grad=True)
    total, weight = PREFERENCE_LOSSES[name](pairs_with(empty), CONTEXT, CONSTANTS)
    total.backward()
    assert (total.item(), weight.item()) == (0, 0)
    assert empty.grad.shape == (0,)


def test_dpo_starts_at_ln_2() -> None:
    assert _loss("dpo", 0.0) == pytest.approx(math.log(2), rel=1e-15)


def test_dpo_swapped() -> None:
    """−log σ(x) + log σ(−x) = −x."""
    stats = two_pairs()
    loss = PREFERENCE_LOSSES["dpo"]
    difference = loss(stats, CONTEXT, CONSTANTS).sum - loss(swapped(stats), CONTEXT, CONSTANTS).sum
    assert difference.item() == pytest.approx(-(1.5 - 1.25), rel=1e-12)


def test_ipo_swapped() -> None:
    """(δ − c)² − (δ + c)² = −4cδ with c = 1/(2β) = 1."""
    stats = two_pairs()
    loss = PREFERENCE_LOSSES["ipo"]
    difference = loss(stats, CONTEXT, CONSTANTS).sum - loss(swapped(stats), CONTEXT, CONSTANTS).sum
    assert difference.item() == pytest.approx(-4 * (3 - 2.5), rel=1e-12)


@pytest.mark.parametrize("name", ["rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"])
def test_rpo_does_not_care_which_is_called_chosen(name: str) -> None:
    """The ground truth's rewards say which one is better: swapping both responses changes nothing."""
    stats = two_pairs()
    loss = PREFERENCE_LOSSES[name]
    there, back = loss(stats, CONTEXT, CONSTANTS).sum, loss(swapped(stats), CONTEXT, CONSTANTS).sum
    assert back.item() == pytest.approx(there.item(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_is_least_at_one_over_two_beta(beta: float) -> None:
    least = 1 / (2 * beta)
    margin = torch.tensor([least], dtype=torch.float64, requires_grad=True)
    value = PREFERENCE_LOSSES["ipo"](pairs_with(margin), CONTEXT, LossConstants(beta)).sum
    value.backward()
    assert (value.item(), margin.grad.item()) == (0, 0)
    assert _loss("ipo", least + 0.1, beta=beta) > 0 < _loss("ipo", least - 0.1, beta=beta)


@pytest.mark.parametrize("name", ["rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"])
@pytest.mark.parametrize("delta", [-3.0, 0.0, 0.7, 4.0])
def test_rpo_is_least_where_the_margins_agree(name: str, delta: float) -> None:
    """βδ = Δ: no loss; on either side there is."""
    agreed = delta / BETA
    assert _loss(name, agreed, delta / ETA) == pytest.approx(0, abs=1e-15)
    assert _loss(name, agreed + 0.1, delta / ETA) > 1e-6 < _loss(name, agreed - 0.1, delta / ETA)


@pytest.mark.parametrize("margin", [-4.0, 0.0, 3.0])
def test_rpo_bwd_kl_becomes_dpo(margin: float) -> None:
    """A ground truth that is certain (Δ → ∞) has no entropy: what remains is −log σ(βδ). At Δ = 40 it lacks 40 e⁻⁴⁰."""
    assert _loss("rpo_bwd_kl", margin, 40 / ETA) == pytest.approx(_loss("dpo", margin), rel=1e-12)


def test_gt_reward_scale_scales_the_ground_truth_only() -> None:
    """η = 3 on a gap of 0.5 is η = 1 on a gap of 1.5, and dpo and ipo do not know it."""
    margin = torch.tensor([1.0], dtype=torch.float64)
    for name in EVERY_LOSS:
        loss = PREFERENCE_LOSSES[name]
        scaled = loss(pairs_with(margin, 0.5), CONTEXT, LossConstants(BETA, 3.0)).sum
        plain = loss(pairs_with(margin, 1.5), CONTEXT, LossConstants(BETA, 1.0)).sum
        other = loss(pairs_with(margin, 0.5), CONTEXT, LossConstants(BETA, 1.0)).sum
        assert scaled.item() == pytest.approx(plain.item(), rel=1e-12)
        assert (scaled.item() == other.item()) == (name in ("dpo", "ipo"))


@pytest.mark.parametrize("name", ["dpo", "rpo_bwd_kl", "rpo_fwd_kl"])
@pytest.mark.parametrize("logit", [-200.0, -30.0, 30.0, 200.0])
@pytest.mark.parametrize("delta", [-50.0, 0.0, 50.0])
def test_far_out_in_float32(name: str, logit: float, delta: float) -> None:
    """|βδ| = 200, |Δ| = 50: equal to float64's far tail, finite gradient of the right sign."""
    margin = torch.tensor([logit / BETA], requires_grad=True)
    value = PREFERENCE_LOSSES[name](pairs_with(margin, delta / ETA), CONTEXT, CONSTANTS).sum
    value.backward()
    # Where σ(x) has rounded to 0 or 1 the divergence is linear: KL(p ‖ q) = −log q on the side where p is certain.
    model = -logsigmoid(torch.tensor([logit, -logit], dtype=torch.float64))
    truth = -logsigmoid(torch.tensor([delta, -delta], dtype=torch.float64))
    entropy = math.log(2) if delta == 0 else 0.0
    expected = {
        "dpo": model[0].item(),
        "rpo_bwd_kl": torch.tensor([delta, -delta], dtype=torch.float64).sigmoid().dot(model).item() - entropy,
        "rpo_fwd_kl": torch.tensor([logit, -logit], dtype=torch.float64).sigmoid().dot(truth).item(),
    }[name]
    # float32 keeps 7 digits; 1e-9 is what the neglected entropy e⁻³⁰ · 30 and the rounding of σ leave at zero.
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert math.isfinite(margin.grad.item())


def _moved(side: ResponseStats, by: float) -> ResponseStats:
    return replace(side, logps=side.logps + by, ref_logps=side.ref_logps + by)


def _loss(name: str, margin: float, reward_gap: float = 0.0, beta: float = BETA) -> float:
    stats = pairs_with(torch.tensor([margin], dtype=torch.float64), reward_gap)
    return PREFERENCE_LOSSES[name](stats, CONTEXT, LossConstants(beta, ETA)).sum.item()
