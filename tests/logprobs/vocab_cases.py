"""One case of vocab-parallel log-probs: its tensors, the dense float64 answer, and a rank's part of the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dpo.parallel.vocab_logps import mean_logits, vocab_parallel_logps

# 41 real rows of 56: at 4 ranks of 14 rows the third is padded in part and the fourth is nothing but padding.
TOKENS, HIDDEN, ROWS, VOCABULARY, CHUNK = 37, 16, 56, 41, 8


class Case(NamedTuple):
    hidden: Tensor  # [TOKENS, HIDDEN]
    weight: Tensor  # [ROWS, HIDDEN]
    targets: Tensor  # [TOKENS]
    upstream: Tensor  # [TOKENS]: gradient of the log-probs


class Answer(NamedTuple):
    logps: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    mean_logits: Tensor


def make_case(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Case:
    """Random, with log-probs from about −1e-4 to −30; first and last real token are among the targets."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(tokens, HIDDEN, generator=generator), torch.randn(ROWS, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    targets[:2] = torch.tensor([0, VOCABULARY - 1])[:tokens]
    hidden[2:5] = weight[targets[2:5]]  # likely targets: log-probs near 0
    return Case((hidden * 1.5).to(dtype), weight.to(dtype), targets, torch.randn(tokens, generator=generator))


def dense_answer(case: Case) -> Answer:
    """All logits at once, in float64; padding rows are cut off first."""
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    logits = hidden @ weight[:VOCABULARY].t()
    logps = logits.log_softmax(-1)[torch.arange(len(case.targets)), case.targets]
    (logps * case.upstream).sum().backward()
    return Answer(logps.detach(), hidden.grad, weight.grad, logits.mean(1).detach())


def answer_of_rank(case: Case, rank: int, size: int, group: dist.ProcessGroup | None, chunk: int = CHUNK) -> Answer:
    """What rank `rank` of the `size` ranks of `group` computes from its rows of the weight."""
    rows = ROWS // size
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    shard: dict[str, Any] = dict(vocab_start=rank * rows, vocab_size=VOCABULARY, group=group)
    logps = vocab_parallel_logps(hidden, weight, case.targets, chunk_tokens=chunk, **shard)
    (logps * case.upstream).sum().backward()
    return Answer(logps.detach(), hidden.grad, weight.grad, mean_logits(hidden, weight, **shard))


def run_rank(rank: int, world: int, folder: Path) -> None:
    """A process of `world`: its answer at every tensor parallel size, written to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    answers = {}
    for size in (1, 2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        group = groups[rank // size]
        for tokens in (TOKENS, 0):
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
                answers[size, tokens] = answer_of_rank(make_case(tokens=tokens), rank % size, size, group)
            answers[size, tokens, "collectives"] = all_reduce.call_count
    torch.save(answers, folder / f"{rank}.pt")
    dist.destroy_process_group()
