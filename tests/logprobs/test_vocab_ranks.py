"""The vocabulary shared by 1, 2 and 4 real gloo ranks: values and gradients against the dense float64 answer."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.logprobs.vocab_cases import HIDDEN, ROWS, TOKENS, dense_answer, make_case, run_rank

WORLD = 4
FLOAT32 = dict(rtol=1e-5, atol=1e-5)  # as in test_vocab_logps.py


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of four processes computed at every tensor parallel size."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=run_rank, args=(rank, WORLD, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * WORLD
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_and_gradients(ranks: list[dict[Any, Any]], size: int) -> None:
    expected = dense_answer(make_case())
    for first in range(0, WORLD, size):
        answers = [rank[size, TOKENS] for rank in ranks[first : first + size]]
        assert all(answer.grad_weight.shape == (ROWS // size, HIDDEN) for answer in answers)
        for answer in answers:
            assert torch.equal(answer.logps, answers[0].logps)
            torch.testing.assert_close(answer.logps.double(), expected.logps, **FLOAT32)
            torch.testing.assert_close(answer.mean_logits.double(), expected.mean_logits, **FLOAT32)
        # Each rank has its part of the hidden states' gradient and the whole of its rows'.
        partial = sum(answer.grad_hidden.double() for answer in answers)
        torch.testing.assert_close(partial, expected.grad_hidden, **FLOAT32)
        rows = torch.cat([answer.grad_weight for answer in answers])
        torch.testing.assert_close(rows.double(), expected.grad_weight, **FLOAT32)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_two_collectives_whatever_the_number_of_chunks(ranks: list[dict[Any, Any]], size: int) -> None:
    """Five chunks: one MAX and one SUM in the log-probs' forward pass, none in the backward, one in mean_logits."""
    assert [rank[size, TOKENS, "collectives"] for rank in ranks] == [3] * WORLD


@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_tokens(ranks: list[dict[Any, Any]], size: int) -> None:
    for rank in ranks:
        answer = rank[size, 0]
        assert answer.logps.shape == (0,)
        assert answer.grad_hidden.shape == (0, HIDDEN)
        assert torch.count_nonzero(answer.grad_weight) == 0
