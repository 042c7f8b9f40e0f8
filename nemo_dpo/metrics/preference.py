"""Figures of a step or a validation pass, from sums that may be added over micro-batches and all-reduced over ranks.

Everything is a sum until `finalize` divides once: no mean of means, whatever the layout. Names are NeMo-Aligner's
(loss … rewards_all_std) and TRL's (rewards/*, logps/*, logits/*). Rewards are β · r in both; r is averaged over tokens
where the preference loss averages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_dpo.losses import ObjectiveOutput, PairStats

# Columns of a sums vector. One tensor, so that reducing all of them is one collective.
SUMS = (
    "weight",
    "loss",
    "preference_loss",
    "sft_loss",
    "pairs",
    "accurate",
    "rewards_chosen",
    "rewards_rejected",
    "rewards_squared",
    "logps_chosen",
    "logps_rejected",
    "logits_chosen",
    "logits_rejected",
    "tokens_chosen",
    "tokens_rejected",
)
NUM_SUMS = len(SUMS)


@torch.no_grad()
def preference_sums(
    stats: PairStats, output: ObjectiveOutput, beta: float, chosen_logits: Tensor, rejected_logits: Tensor
) -> Tensor:
    """The sums of one micro-batch.

    Args:
        stats: the micro-batch's P pairs.
        output: what the objective made of them.
        beta: β, which scales the logged rewards.
        chosen_logits: [P] Σ over a chosen response's tokens of the mean over the vocabulary of the logits there.
        rejected_logits: [P] the same of the rejected responses.

    Returns:
        [NUM_SUMS] float64, ordered as SUMS.
    """
    chosen, rejected = beta * output.chosen_log_ratio.double(), beta * output.rejected_log_ratio.double()
    columns = {
        "weight": output.weight,
        "loss": output.total,
        "preference_loss": output.preference,
        "sft_loss": output.sft,
        "pairs": torch.ones_like(chosen),
        # A tie is not accurate: at the first step, where all rewards are 0, accuracy is 0.
        "accurate": chosen > rejected,
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "rewards_squared": chosen.square() + rejected.square(),
        "logps_chosen": stats.chosen.logps,
        "logps_rejected": stats.rejected.logps,
        "logits_chosen": chosen_logits,
        "logits_rejected": rejected_logits,
        "tokens_chosen": stats.chosen.tokens,
        "tokens_rejected": stats.rejected.tokens,
    }
    return torch.stack([columns[name].sum(dtype=torch.float64) for name in SUMS])


def finalize(sums: Tensor) -> dict[str, float]:
    """Sums over everything that is to be reported on → figures by name.

    `rewards_all_std` is the sample standard deviation (n − 1) over the rewards of all responses, as torch.std has it.
    `logits/*` are means over response tokens, all other figures means over pairs.

    Raises:
        ValueError: there is no pair.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    pairs = total["pairs"]
    if not pairs:
        raise ValueError("no preference pair was counted: there is nothing to report on")
    chosen, rejected = total["rewards_chosen"] / pairs, total["rewards_rejected"] / pairs
    accuracy = total["accurate"] / pairs
    mean = (chosen + rejected) / 2
    variance = (total["rewards_squared"] - 2 * pairs * mean**2) / (2 * pairs - 1)
    return {
        "loss": total["loss"] / total["weight"],
        "preference_loss": total["preference_loss"] / total["weight"],
        "sft_loss": total["sft_loss"] / total["weight"],
        "acc": accuracy,
        "rewards_chosen_mean": chosen,
        "rewards_rejected_mean": rejected,
        "rewards_all_mean": mean,
        "rewards_all_std": math.sqrt(max(variance, 0.0)),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": accuracy,
        "rewards/margins": chosen - rejected,
        "logps/chosen": total["logps_chosen"] / pairs,
        "logps/rejected": total["logps_rejected"] / pairs,
        "logits/chosen": total["logits_chosen"] / total["tokens_chosen"],
        "logits/rejected": total["logits_rejected"] / total["tokens_rejected"],
    }
