"""Chunked log-probs in one process: values and gradients against dense float64, memory, and what may not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dpo.logprobs import response_logps, segment_sum
from nemo_dpo.parallel import vocab_logps
from nemo_dpo.parallel.vocab_logps import mean_logits, vocab_parallel_logps
from tests.logprobs.vocab_cases import (
    CHUNK,
    HIDDEN,
    ROWS,
    TOKENS,
    VOCABULARY,
    answer_of_rank,
    dense_answer,
    make_case,
)

# float32 keeps 6e-8 of a logit of at most about 60 (16 products of up to 4): 4e-6 absolute, 1e-5 with its exponential.
FLOAT32 = dict(rtol=1e-5, atol=1e-5)
WHOLE: dict[str, Any] = dict(vocab_start=0, vocab_size=VOCABULARY, group=None)


@pytest.mark.parametrize("chunk", [1, CHUNK, TOKENS, 1000])
def test_values_and_gradients(chunk: int) -> None:
    case = make_case()
    answer, expected = answer_of_rank(case, 0, 1, None, chunk), dense_answer(case)
    for got, want in zip(answer, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, **FLOAT32)


def test_log_probs_near_0_keep_their_digits() -> None:
    """log p = −1e-3 beside logits of 60: subtracting a log-sum-exp of 60 would leave 4e-6 / 1e-3 = 4e-3 relative."""
    weight = torch.tensor([[60.0], [60.0 - 6.9]])
    logps = vocab_parallel_logps(
        torch.ones(1, 1), weight, torch.tensor([0]), vocab_start=0, vocab_size=2, group=None, chunk_tokens=4
    )
    expected = weight.double().flatten().log_softmax(0)[0].item()
    assert logps.item() == pytest.approx(expected, rel=1e-4)


def test_bf16() -> None:
    """Logits are rounded to bf16, 2⁻⁹ relative: up to 0.12 at 60. Gradients, sums of many, to 2 % of their norm."""
    case = make_case(torch.bfloat16)
    answer, expected = answer_of_rank(case, 0, 1, None), dense_answer(case)
    assert answer.logps.dtype == torch.float32
    torch.testing.assert_close(answer.logps.double(), expected.logps, rtol=0, atol=0.25)
    for got, want in ((answer.grad_hidden, expected.grad_hidden), (answer.grad_weight, expected.grad_weight)):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() < 0.02 * want.norm()


def test_bf16_weight_gradient_does_not_degrade_with_the_number_of_chunks() -> None:
    """512 chunks of one token each add 1/512 of the gradient: added up in bf16 (2⁻⁹), half of them would be lost."""
    tokens = 512
    weight = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    hidden, targets = torch.ones(tokens, 4, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.long)
    logps = vocab_parallel_logps(hidden, weight, targets, vocab_start=0, vocab_size=2, group=None, chunk_tokens=1)
    logps.sum().backward()
    # Each token gives 1 − 1/2 to its target's row and −1/2 to the other: sums of 512 halves, exact in bf16.
    assert weight.grad.tolist() == [[256.0] * 4, [-256.0] * 4]


def test_bf16_hidden_gradient_does_not_degrade_with_the_number_of_blocks() -> None:
    """512 blocks of one vocabulary row: all but the target's add −1/512. Added up in bf16 they would stop at −1/2."""
    tokens = rows = 512
    weight = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight[0] = 0
    hidden = torch.zeros(tokens, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    vocab_parallel_logps(
        hidden, weight, targets, vocab_start=0, vocab_size=rows, group=None, chunk_tokens=1
    ).sum().backward()
    # −511/512 once rounded to bf16, 2⁻⁸ apart just below 1
    assert hidden.grad.dtype == torch.bfloat16
    assert hidden.grad.float().flatten().tolist() == pytest.approx([-511 / 512] * tokens, abs=2**-9)


def test_mean_logits_carry_no_graph() -> None:
    case = make_case()
    assert not mean_logits(case.hidden.requires_grad_(), case.weight.requires_grad_(), **WHOLE).requires_grad


def test_mean_logits_of_a_weight_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    whole = mean_logits(case.hidden, case.weight, **WHOLE)
    monkeypatch.setattr(vocab_logps, "MEAN_BLOCK_ROWS", 3)
    torch.testing.assert_close(mean_logits(case.hidden, case.weight, **WHOLE), whole, **FLOAT32)


def test_padding_rows_take_no_part() -> None:
    """Whatever they hold, also NaN; a target among them is impossible rather than silently something."""
    case = make_case()
    plain = answer_of_rank(case, 0, 1, None)
    case.weight[VOCABULARY:] = torch.nan
    spoilt = answer_of_rank(case, 0, 1, None)
    assert all(torch.equal(got, want) for got, want in zip(spoilt, plain, strict=True))
    assert torch.count_nonzero(plain.grad_weight[VOCABULARY:]) == 0
    outside = torch.tensor([VOCABULARY, ROWS - 1, ROWS, -1])
    case.weight[VOCABULARY:] = 0
    logps = vocab_parallel_logps(case.hidden[:4], case.weight, outside, chunk_tokens=CHUNK, **WHOLE)
    assert logps.tolist() == [-torch.inf] * 4


def test_value_is_the_same_with_and_without_gradients() -> None:
    """Bitwise: at the first step the policy's log-probs must equal the reference's."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(dtype)
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        with_grad = vocab_parallel_logps(hidden, weight, case.targets, chunk_tokens=CHUNK, **WHOLE)
        with torch.no_grad():
            without = vocab_parallel_logps(hidden, weight, case.targets, chunk_tokens=CHUNK, **WHOLE)
        assert with_grad.requires_grad and not without.requires_grad
        assert torch.equal(with_grad, without)


def test_other_chunks_do_not_matter() -> None:
    """Bitwise: a chunk's log-probs do not know what the other chunks hold."""
    case = make_case()
    changed = case._replace(hidden=case.hidden.clone())
    changed.hidden[CHUNK:] *= -1
    got, want = answer_of_rank(changed, 0, 1, None), answer_of_rank(case, 0, 1, None)
    assert torch.equal(got.logps[:CHUNK], want.logps[:CHUNK])
    assert not torch.equal(got.logps[CHUNK:], want.logps[CHUNK:])


def test_frozen_weight_and_frozen_hidden() -> None:
    case = make_case()
    full = answer_of_rank(case, 0, 1, None)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    for inputs in ((hidden, case.weight), (case.hidden, weight)):
        logps = vocab_parallel_logps(*inputs, case.targets, chunk_tokens=CHUNK, **WHOLE)
        (logps * case.upstream).sum().backward()
    assert torch.equal(hidden.grad, full.grad_hidden)
    assert torch.equal(weight.grad, full.grad_weight)


def test_no_tokens() -> None:
    answer = answer_of_rank(make_case(tokens=0), 0, 1, None)
    assert answer.logps.shape == answer.mean_logits.shape == (0,)
    assert answer.grad_hidden.shape == (0, HIDDEN)
    assert torch.equal(answer.grad_weight, torch.zeros(ROWS, HIDDEN))


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_of_all_tokens_never_exist() -> None:
    """Neither forward nor backward, and nothing of the vocabulary's size is kept between them."""
    tokens, hidden_size, rows, chunk = 96, 4, 200, 8
    hidden, weight = torch.randn(tokens, hidden_size).requires_grad_(), torch.randn(rows, hidden_size).requires_grad_()
    targets = torch.randint(rows, (tokens,))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = vocab_parallel_logps(
            hidden, weight, targets, vocab_start=0, vocab_size=rows, group=None, chunk_tokens=chunk
        )
    with LargestTensor() as backward:
        logps.sum().backward()
    assert sorted(kept) == sorted([tokens * hidden_size, rows * hidden_size, tokens, tokens])
    # A chunk's logits are the largest tensor: twice the weight here, and a twelfth of all logits.
    assert forward.elements == chunk * rows
    # The backward pass rounds its blocks down to whole vocabulary rows: at most `tokens` elements fewer.
    assert chunk * rows - tokens < backward.elements <= chunk * rows


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_the_gradient_of_what_is_frozen_is_not_computed(frozen: str) -> None:
    """Told by the largest tensor of the backward pass, in which a chunk's logits are small: 2 tokens of 20 rows."""
    tokens, hidden_size, rows = (40, 50, 20) if frozen == "hidden" else (6, 50, 20)
    hidden = torch.randn(tokens, hidden_size, requires_grad=frozen != "hidden")
    weight = torch.randn(rows, hidden_size, requires_grad=frozen != "weight")
    targets = torch.randint(rows, (tokens,))
    logps = vocab_parallel_logps(hidden, weight, targets, vocab_start=0, vocab_size=rows, group=None, chunk_tokens=2)
    with LargestTensor() as backward:
        logps.sum().backward()
    assert backward.elements == (weight.numel() if frozen == "hidden" else hidden.numel())


def test_responses_against_the_dense_oracle() -> None:
    """The product's path (positions picked, chunked log-probs, sums over responses) and the oracle's."""
    rows, length, vocabulary = 3, 7, 11
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(rows, length, HIDDEN, generator=generator)
    weight = torch.randn(vocabulary, HIDDEN, generator=generator)
    positions = torch.tensor([2, 3, 4, 9, 10, 14, 15, 16, 17])
    segments = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    targets = torch.randint(vocabulary, (len(positions),), generator=generator)
    upstream = torch.tensor([1.0, -2.0, 0.5])

    dense = [states.double().requires_grad_(), weight.double().requires_grad_()]
    expected = response_logps(dense[0] @ dense[1].t(), positions, targets, segments, 3)
    (expected * upstream).sum().backward()

    chunked = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    picked = chunked[0].flatten(0, 1).index_select(0, positions)
    tokens = vocab_parallel_logps(
        picked, chunked[1], targets, vocab_start=0, vocab_size=vocabulary, group=None, chunk_tokens=4
    )
    logps = segment_sum(tokens, segments, 3)
    (logps * upstream).sum().backward()

    torch.testing.assert_close(logps.double(), expected, **FLOAT32)
    for got, want in zip(chunked, dense, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, **FLOAT32)
