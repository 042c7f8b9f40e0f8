"""Log-probs of given tokens without the logits: [R, V] never exists, neither as logits nor as probabilities.

R counts tokens, H the hidden size, V this rank's rows of the output layer. The forward pass goes over the tokens in
chunks and keeps the log of the softmax's denominator, [R]; the backward pass makes the logits again, in blocks of
vocabulary rows as large as the forward's chunks. By blocks of rows each row of the weight's gradient is written once,
by one matrix product over all tokens; by chunks of tokens it would be a sum over chunks, which in bf16 either loses
small terms or needs a second, float32 copy of the largest weight of the model. (The gradient of `hidden` is the sum
over blocks instead; its float32 copy is [R, H].)

Rows that pad the vocabulary to a divisible size are left out of the softmax, so that log-probs equal those of the
unpadded model; Megatron-LM lets them take part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

MEAN_BLOCK_ROWS = 8192


def vocab_parallel_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
) -> Tensor:
    """log softmax(hidden · weightᵀ)[targets] over the vocabulary that the ranks of `group` share.

    Matrix products run in the inputs' dtype, everything after them in float32. The value does not depend on whether
    gradients are on. The gradient of `hidden` is this rank's part: the caller sums it over `group`.

    Args:
        hidden: [R, H], the same on all ranks of `group`; R may be 0.
        weight: [V, H], rows vocab_start … vocab_start + V − 1 of the output layer.
        targets: [R] int64 token ids in 0 … vocab_size − 1. An id outside gives −inf.
        vocab_start: the first row's token id.
        vocab_size: tokens of the tokenizer; rows from there on are padding, take no part and get gradient 0.
        group: the ranks that share the vocabulary; None where `weight` is the whole.
        chunk_tokens: tokens whose logits exist at a time. Memory: about 2 · chunk_tokens · V float32, as one chunk is
            freed only when the next one is there.

    Returns:
        [R] float32, the same on all ranks of `group`.
    """
    real_rows = min(max(vocab_size - vocab_start, 0), weight.shape[0])
    logps: Tensor = _VocabParallelLogps.apply(hidden, weight, targets - vocab_start, real_rows, group, chunk_tokens)
    return logps


@torch.no_grad()
def mean_logits(
    hidden: Tensor, weight: Tensor, *, vocab_start: int, vocab_size: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Mean over the unpadded vocabulary of each token's logits, [R, H] → [R] float32, without gradient.

    The mean of products with all rows is the product with the mean row, so no logits are made.
    """
    real_rows = min(max(vocab_size - vocab_start, 0), weight.shape[0])
    row_sum = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for block in weight[:real_rows].split(MEAN_BLOCK_ROWS):
        row_sum += block.sum(0, dtype=torch.float32)
    if group is not None:
        dist.all_reduce(row_sum, group=group)
    return hidden.float() @ (row_sum / vocab_size)


class _VocabParallelLogps(torch.autograd.Function):
    """Saves hidden, weight, local targets and the [R] log-denominators, nothing of the vocabulary's size.

    `targets` here are row numbers of `weight`; those outside 0 … real_rows − 1 belong to other ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        real_rows: int,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
    ) -> Tensor:
        peak, total, picked = _softmax_parts(hidden, weight[:real_rows], targets, chunk_tokens)
        if group is not None:
            peak, total, picked = _combine(peak, total, picked, group)
        log_total = total.log()
        ctx.save_for_backward(hidden, weight, targets, peak + log_total)
        ctx.real_rows, ctx.chunk_tokens = real_rows, chunk_tokens
        # In this order, not picked − (peak + log_total): a log-prob near 0 keeps its digits.
        return (picked - peak) - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        for_hidden, for_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if for_hidden else None
        grad_weight = torch.zeros_like(weight) if for_weight else None
        # As many logits at a time as in the forward pass, but for all tokens.
        block_rows = max(1, ctx.chunk_tokens * ctx.real_rows // max(1, len(targets)))
        for start in range(0, ctx.real_rows, block_rows):
            stop = min(start + block_rows, ctx.real_rows)
            grad_logits = _grad_logits(hidden, weight[start:stop], targets - start, lse, grad_logps)
            if grad_hidden is not None:
                grad_hidden += grad_logits @ weight[start:stop]
            if grad_weight is not None:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[start:stop])
        # Autograd rounds grad_hidden to the dtype of hidden.
        return grad_hidden, grad_weight, None, None, None, None


def _softmax_parts(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's largest logit, Σ exp(logit − largest), the target's logit or −inf if it is elsewhere; each [R]."""
    tokens = len(targets)
    peak = torch.full((tokens,), -torch.inf, dtype=torch.float32, device=hidden.device)
    total, picked = torch.zeros_like(peak), peak.clone()
    if not len(weight):
        return peak, total, picked
    for start in range(0, tokens, chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = (hidden[chunk] @ weight.t()).float()
        columns, here = _local_columns(targets[chunk], len(weight))
        picked[chunk] = logits.gather(1, columns).squeeze(1).masked_fill(~here, -torch.inf)
        peak[chunk] = logits.amax(1)
        total[chunk] = logits.sub_(peak[chunk, None]).exp_().sum(1)
    return peak, total, picked


def _combine(peak: Tensor, total: Tensor, picked: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The parts over all ranks' rows: two collectives, whatever the number of chunks."""
    largest = torch.stack((peak, picked))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = total * (peak - largest[0]).exp()
    dist.all_reduce(total, group=group)
    return largest[0], total, largest[1]


def _grad_logits(hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor) -> Tensor:
    """grad · (onehot(target) − softmax) for a block of rows, [R, rows] in the dtype of `hidden`."""
    logits = (hidden @ weight.t()).float()
    grad = logits.sub_(lse[:, None]).exp_().mul_(-grad_logps[:, None])
    columns, here = _local_columns(targets, len(weight))
    grad.scatter_add_(1, columns, (grad_logps * here)[:, None])
    return grad.to(hidden.dtype)


def _local_columns(targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Each target as a valid column [R, 1], and whether it really is one of this block's [R]."""
    here = (targets >= 0) & (targets < rows)
    return targets.clamp(0, rows - 1)[:, None], here
