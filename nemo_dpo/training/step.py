"""One micro-batch, from log-probs to the loss: no model, no ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nemo_dpo.data.batch import MicroBatch
from nemo_dpo.losses import BatchContext, Objective, PairStats, ResponseStats
from nemo_dpo.metrics.preference import preference_sums
from nemo_dpo.parallel.response import forward_responses

NO_CONTEXT = BatchContext()


class Outcome(NamedTuple):
    """What a micro-batch leaves for figures and for reports: no gradients."""

    sums: Tensor  # [NUM_SUMS], see nemo_dpo.metrics.preference
    logps: Tensor  # [N]: the policy's, summed over each response


def pair_stats(batch: MicroBatch, logps: Tensor, ref_logps: Tensor) -> PairStats:
    """Per-response log-probs [N] of policy and reference → the columns of the batch's P pairs."""
    tokens = batch.response_tokens.to(logps.dtype)
    sides = [
        ResponseStats(
            logps=logps[rows],
            ref_logps=ref_logps[rows],
            tokens=tokens[rows],
            reward=batch.rewards[:, side],
        )
        for side, rows in enumerate(batch.pair_segments.unbind(1))
    ]
    return PairStats(*sides)


def objective_step(
    objective: Objective, ref_logps: Sequence[Tensor]
) -> Callable[[Iterator[MicroBatch], nn.Module], tuple[Any, Callable[[Any], Any]]]:
    """The forward step of a whole batch for megatron-core's schedule; collects the `Outcome` of each micro-batch.

    Args:
        ref_logps: the reference's [N] of each micro-batch, in their order; empty where this rank is not the last stage.
    """
    remaining = iter(ref_logps)

    def loss(batch: MicroBatch, logps: Tensor, logit_sums: Tensor) -> tuple[Tensor, Tensor, Outcome]:
        stats = pair_stats(batch, logps, next(remaining))
        output = objective(stats, NO_CONTEXT)
        chosen, rejected = batch.pair_segments.unbind(1)
        sums = preference_sums(stats, output, objective.beta, logit_sums[chosen], logit_sums[rejected])
        return output.total, output.weight, Outcome(sums, logps.detach())

    return lambda iterator, chunk: forward_responses(iterator, chunk, loss)
