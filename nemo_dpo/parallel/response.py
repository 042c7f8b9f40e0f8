"""The forward steps that megatron-core's schedule runs on a micro-batch of responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from nemo_dpo.data.batch import MicroBatch
from nemo_dpo.logprobs import segment_sum

# (micro-batch, per-response log-probs [N], per-response sums of mean logits [N]) → (sum, weight, to collect)
ResponseLoss = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Tensor, Any]]


def forward_responses(
    iterator: Iterator[MicroBatch], chunk: nn.Module, loss: ResponseLoss
) -> tuple[Any, Callable[[Any], Any]]:
    """Run `chunk` on the next micro-batch; on the last stage `loss` gets its responses' summed log-probs."""
    batch = next(iterator)
    output = chunk(batch.tokens, batch.position_ids, batch.response_positions, batch.targets)

    def reduce(tokens: Any) -> tuple[Tensor, Tensor, Any]:
        logps = segment_sum(tokens.logps, batch.response_segment, batch.num_responses)
        return loss(batch, logps, segment_sum(tokens.mean_logits, batch.response_segment, batch.num_responses))

    return output, reduce


def collect_logps(iterator: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Any, Callable[[Any], Any]]:
    """A forward step without a loss: collects the log-probs [N] of each micro-batch."""
    return forward_responses(iterator, chunk, lambda _, logps, __: (logps.sum(), logps.new_zeros(()), logps))
