"""Preference losses: pure functions of δ, the margin between the log-ratios of chosen and rejected, and for the RPO
family of Δ, the scaled margin between their ground-truth rewards. The formulas are NeMo-Aligner's.

Whether δ is summed or averaged over tokens is decided once, by `Objective`, before a loss sees it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_dpo.losses.types import BatchContext, LossConstants, LossSum, PairStats, sum_over_pairs


def dpo(stats: PairStats, ctx: BatchContext, constants: LossConstants) -> LossSum:
    """− log σ(β δ). Direct Preference Optimization, Eq. 7 of arXiv 2305.18290."""
    return sum_over_pairs(-logsigmoid(constants.beta * stats.margin))


def ipo(stats: PairStats, ctx: BatchContext, constants: LossConstants) -> LossSum:
    """(δ − 1/(2β))². Identity Preference Optimization, Eq. 17 of arXiv 2310.12036; δ in nats, least at 1/(2β)."""
    return sum_over_pairs((stats.margin - 1 / (2 * constants.beta)).square())


def rpo_sq(stats: PairStats, ctx: BatchContext, constants: LossConstants) -> LossSum:
    """(β δ − Δ)². Reward-aware Preference Optimization (arXiv 2406.11704) with the squared distance."""
    model, truth = _preference_logits(stats, constants)
    return sum_over_pairs((model - truth).square())


def rpo_bwd_kl(stats: PairStats, ctx: BatchContext, constants: LossConstants) -> LossSum:
    """KL(σ(Δ) ‖ σ(βδ)): RPO with the divergence of the model from the ground truth. Δ → ∞ makes it `dpo`."""
    model, truth = _preference_logits(stats, constants)
    return sum_over_pairs(_bernoulli_kl(truth, model))


def rpo_fwd_kl(stats: PairStats, ctx: BatchContext, constants: LossConstants) -> LossSum:
    """KL(σ(βδ) ‖ σ(Δ)): RPO with the divergence of the ground truth from the model."""
    model, truth = _preference_logits(stats, constants)
    return sum_over_pairs(_bernoulli_kl(model, truth))


def _preference_logits(stats: PairStats, constants: LossConstants) -> tuple[Tensor, Tensor]:
    """(βδ, Δ), each [P]: the log-odds that chosen is the better one, by the model and by the ground truth."""
    return constants.beta * stats.margin, constants.gt_reward_scale * stats.reward_gap


def _bernoulli_kl(p_logit: Tensor, q_logit: Tensor) -> Tensor:
    """KL(Bernoulli(σ(p)) ‖ Bernoulli(σ(q))) from log-odds.

    Written with log σ throughout, so that it and its gradients stay finite where σ itself has rounded to 0 or 1.
    """
    win = p_logit.sigmoid() * (logsigmoid(p_logit) - logsigmoid(q_logit))
    lose = (-p_logit).sigmoid() * (logsigmoid(-p_logit) - logsigmoid(-q_logit))
    return win + lose
