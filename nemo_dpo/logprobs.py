"""From token log-probs to response log-probs, and the dense oracle that the chunked, vocab-parallel path must equal.

R counts response tokens, N responses, V the vocabulary. A token is addressed by `response_positions`, the flat index
row · S + s of the position whose output predicts it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Sum the values of each segment, in their own dtype and in token order.

    The same on every run and device: each segment is reduced by itself, where index_add on a GPU adds in the order in
    which threads arrive. float32 suffices: 1,000 terms added one by one are off by about 1e-6 relative.

    Args:
        values: [R] float.
        segments: [R] int64 in 0 … num_segments − 1, in any order.
        num_segments: N.

    Returns:
        [N]; 0 for a segment without tokens.
    """
    order = segments.argsort(stable=True)
    numbers = torch.arange(num_segments + 1, device=segments.device)
    offsets = torch.searchsorted(segments[order], numbers)
    sums: Tensor = torch.segment_reduce(values[order], "sum", offsets=offsets, initial=0)
    return sums


def response_logps(
    logits: Tensor, response_positions: Tensor, targets: Tensor, response_segment: Tensor, num_responses: int
) -> Tensor:
    """The dense oracle: summed log-prob of each response from full logits. Slow and obvious on purpose.

    Args:
        logits: [rows, S, V] over the whole, unpadded vocabulary.
        response_positions: [R] row · S + s.
        targets: [R] the token that each position predicts.
        response_segment: [R] number of the response that the token belongs to.
        num_responses: N.

    Returns:
        [N] in the logits' dtype.
    """
    logps = logits.flatten(0, 1).log_softmax(-1)[response_positions, targets]
    members = response_segment == torch.arange(num_responses, device=logits.device)[:, None]
    return (members * logps).sum(1)
