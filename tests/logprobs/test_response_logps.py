"""Sums over responses, and the dense oracle itself against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_dpo.logprobs import response_logps, segment_sum


def test_segment_sum_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = segment_sum(values, torch.tensor([2, 0, 2, 0, 3]), 5)
    assert sums.tolist() == [10, 0, 5, 16, 0]
    (sums * torch.tensor([1.0, 10, 100, 1000, 1e4])).sum().backward()
    assert values.grad.tolist() == [100, 1, 100, 1, 1000]


def test_segment_sum_gradcheck() -> None:
    values = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segments = torch.tensor([0, 0, 3, 1, 1, 1, 3, 0, 3])
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, segments, 4), (values,))


@pytest.mark.parametrize("num_segments", [0, 3])
def test_segment_sum_of_nothing(num_segments: int) -> None:
    values = torch.zeros(0, requires_grad=True)
    sums = segment_sum(values, torch.zeros(0, dtype=torch.long), num_segments)
    assert (sums.tolist(), sums.dtype) == ([0.0] * num_segments, torch.float32)
    sums.sum().backward()
    assert values.grad.shape == (0,)


def test_segment_sum_in_float32_is_precise_enough() -> None:
    """A response of 4,000 tokens: adding one by one is off by some of its 4,000 roundings of 6e-8 relative."""
    values = -torch.rand(8000, generator=torch.Generator().manual_seed(1)) * 5
    segments = torch.arange(8000) % 2
    exact = torch.stack([values[segments == n].double().sum() for n in range(2)])
    assert segment_sum(values, segments, 2).tolist() == pytest.approx(exact.tolist(), rel=1e-5)


def test_a_segment_does_not_depend_on_what_else_is_in_the_batch() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(2))
    alone = segment_sum(values[100:250], torch.zeros(150, dtype=torch.long), 1)
    segments = torch.tensor([2] * 100 + [0] * 150 + [1] * 50)
    assert torch.equal(segment_sum(values, segments, 3)[:1], alone)


def test_oracle_by_hand() -> None:
    """Two rows of three positions over a vocabulary of two tokens; logits that are log-probs up to a shift.

    Response 0: row 0, positions 1 and 2 predict tokens 1 and 0. Response 1: row 1, position 0 predicts token 1.
    """
    odds = torch.tensor([[[9, 1], [1, 3], [4, 1]], [[1, 7], [1, 1], [1, 1]]], dtype=torch.float64)
    logits = odds.log() + torch.arange(6.0).view(2, 3, 1)
    positions, targets, segments = torch.tensor([1, 2, 3]), torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1])
    logps = response_logps(logits, positions, targets, segments, 3)
    assert logps.tolist() == pytest.approx([math.log(3 / 4 * 4 / 5), math.log(7 / 8), 0], rel=1e-12)
