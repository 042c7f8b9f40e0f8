"""What a run minimises: a preference loss and the SFT term, weighted, with their length-averaging switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from torch import Tensor

from nemo_dpo.losses.preference import dpo, ipo, rpo_bwd_kl, rpo_fwd_kl, rpo_sq
from nemo_dpo.losses.sft import sft
from nemo_dpo.losses.types import BatchContext, LossConstants, LossSum, PairStats, PreferenceLoss, sum_over_pairs

# The values of model.dpo.preference_loss. A new loss is a function beside these, a line here, a name in config.limits.
PREFERENCE_LOSSES: Mapping[str, PreferenceLoss] = MappingProxyType(
    {
        "dpo": dpo,
        "ipo": ipo,
        "rpo_sq": rpo_sq,
        "rpo_bwd_kl": rpo_bwd_kl,
        "rpo_fwd_kl": rpo_fwd_kl,
    }
)


class ObjectiveOptions(Protocol):
    """The keys of `model.dpo` that shape the objective; the schema's DpoConfig has them."""

    @property
    def preference_loss(self) -> str: ...
    @property
    def ref_policy_kl_penalty(self) -> float: ...
    @property
    def gt_reward_scale(self) -> float: ...
    @property
    def preference_average_log_probs(self) -> bool: ...
    @property
    def sft_average_log_probs(self) -> bool: ...
    @property
    def preference_loss_weight(self) -> float: ...
    @property
    def sft_loss_weight(self) -> float: ...


class ObjectiveOutput(NamedTuple):
    """Sums over the pairs of a micro-batch; scalars but the last two."""

    total: Tensor  # preference_loss_weight · preference + sft_loss_weight · sft: what is differentiated
    preference: Tensor  # Σ preference loss, unweighted; 0 where its weight is 0
    sft: Tensor  # Σ SFT term, unweighted; 0 where its weight is 0
    weight: Tensor  # what the all-reduced sums are divided by, for the gradients and for the figures
    chosen_log_ratio: Tensor  # [P] r as the preference loss saw it, summed or averaged over tokens, without gradient
    rejected_log_ratio: Tensor  # [P]


@dataclass(frozen=True)
class Objective:
    """A preference loss with its constants, the SFT term, and what each weighs. Build it by `build_objective`."""

    preference_loss: PreferenceLoss
    constants: LossConstants
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0
    preference_average_log_probs: bool = False
    sft_average_log_probs: bool = False

    @property
    def beta(self) -> float:
        """β, by which logged rewards are scaled."""
        return self.constants.beta

    def __call__(self, stats: PairStats, ctx: BatchContext) -> ObjectiveOutput:
        """The sums over `stats`' pairs. A term of weight 0 is not computed: 0 · inf would be NaN."""
        seen = _averaged(stats, self.preference_average_log_probs)
        preference = sft_term = _nothing(stats)
        if self.preference_loss_weight:
            preference = self.preference_loss(seen, ctx, self.constants)
        if self.sft_loss_weight:
            sft_term = sft(_averaged(stats, self.sft_average_log_probs), ctx)
        return ObjectiveOutput(
            total=self.preference_loss_weight * preference.sum + self.sft_loss_weight * sft_term.sum,
            preference=preference.sum.detach(),
            sft=sft_term.sum.detach(),
            weight=preference.weight,
            chosen_log_ratio=seen.chosen.log_ratio.detach(),
            rejected_log_ratio=seen.rejected.log_ratio.detach(),
        )


def build_objective(options: ObjectiveOptions) -> Objective:
    """The objective that `model.dpo` asks for, whose values `config.check` has judged."""
    return Objective(
        preference_loss=PREFERENCE_LOSSES[options.preference_loss],
        constants=LossConstants(options.ref_policy_kl_penalty, options.gt_reward_scale),
        preference_loss_weight=options.preference_loss_weight,
        sft_loss_weight=options.sft_loss_weight,
        preference_average_log_probs=options.preference_average_log_probs,
        sft_average_log_probs=options.sft_average_log_probs,
    )


def _averaged(stats: PairStats, average: bool) -> PairStats:
    return stats.per_token() if average else stats


def _nothing(stats: PairStats) -> LossSum:
    """A term that is switched off: zero for every pair, and no gradient."""
    return sum_over_pairs(stats.chosen.logps.new_zeros(len(stats.chosen.logps)))
