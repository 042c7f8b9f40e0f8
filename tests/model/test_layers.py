"""Norm and CausalAttention against slow, obvious computations; values and gradients, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_dpo.model.layers import CausalAttention, Norm

HIDDEN, LENGTH, ROWS, CHANNELS = 12, 7, 2, 8


def config(**changes: Any) -> Any:
    """The part of megatron-core's TransformerConfig that the two layers read."""
    settings: dict[str, Any] = {
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "params_dtype": torch.float64,
        "sequence_parallel": False,
        "attention_dropout": 0.0,
        "kv_channels": CHANNELS,
        "window_size": None,
    }
    return SimpleNamespace(**{**settings, **changes})


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a random projection of `output`."""
    weight = random(*output.shape, seed=99).detach()
    return list(torch.autograd.grad((output * weight).sum(), inputs))


def slow_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """From the definitions: RMSNorm divides by the root of the mean square, LayerNorm subtracts the mean first."""
    if bias is None:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() + bias


# A zero-centred norm (NeMo's layernorm1p) stores its scale less one.
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centred", [False, True])
def test_norm(kind: str, zero_centred: bool) -> None:
    norm = Norm(config(normalization=kind, layernorm_zero_centered_gamma=zero_centred), HIDDEN, eps=0.1)
    x = random(LENGTH, ROWS, HIDDEN, seed=1)
    # Freshly made, it only normalises.
    plain = slow_norm(x, torch.ones(()), None if kind == "RMSNorm" else torch.zeros(()), 0.1)
    torch.testing.assert_close(norm(x), plain)
    parameters = list(norm.parameters())
    assert len(parameters) == (1 if kind == "RMSNorm" else 2)
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(random(HIDDEN, seed=2 + number))
    scale = norm.weight + 1 if zero_centred else norm.weight
    slow = slow_norm(x, scale, norm.bias, 0.1)
    torch.testing.assert_close(norm(x), slow)
    for ours, theirs in zip(gradients(norm(x), [x, *parameters]), gradients(slow, [x, *parameters]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_tells_megatron_core_whether_its_gradients_are_parts(sequence_parallel: bool) -> None:
    norm = Norm(config(normalization="LayerNorm", sequence_parallel=sequence_parallel), HIDDEN)
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel] * 2


def slow_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, before: int = LENGTH) -> Tensor:
    """One position, row and head at a time: softmax over its own position and `before` ones before it."""
    length, rows, heads, _ = query.shape
    group = heads // key.shape[2]
    outputs = []
    for s in range(length):
        for b in range(rows):
            for h in range(heads):
                seen = slice(max(0, s - before), s + 1)
                scores = (key[seen, b, h // group] @ query[s, b, h]) * scale
                outputs.append(scores.softmax(0) @ value[seen, b, h // group])
    return torch.stack(outputs).view(length, rows, -1)


def attention(**changes: Any) -> CausalAttention:
    return CausalAttention(config(**changes), layer_number=1, attn_mask_type=None, attention_type="self")


@pytest.mark.parametrize("groups", [1, 2, 4], ids="{}_groups".format)
def test_attention(groups: int) -> None:
    query = random(LENGTH, ROWS, 4, CHANNELS, seed=4)
    key, value = (random(LENGTH, ROWS, groups, CHANNELS, seed=seed) for seed in (5, 6))
    found = attention()(query, key, value, None)
    slow = slow_attention(query, key, value, 1 / math.sqrt(CHANNELS))
    assert found.shape == (LENGTH, ROWS, 4 * CHANNELS)
    torch.testing.assert_close(found, slow)
    inputs = [query, key, value]
    for ours, theirs in zip(gradients(found, inputs), gradients(slow, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("before", [0, 1, 4, 5, 6, 7])
def test_attention_with_a_sliding_window(before: int) -> None:
    """7 positions: from 6 before its own on, a position sees all."""
    inputs = [random(LENGTH, ROWS, heads, CHANNELS, seed=seed) for heads, seed in ((4, 4), (2, 5), (2, 6))]
    found = attention(window_size=(before, 0))(*inputs, None)
    slow = slow_attention(*inputs, 1 / math.sqrt(CHANNELS), before)
    torch.testing.assert_close(found, slow)
    for ours, theirs in zip(gradients(found, inputs), gradients(slow, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attention_takes_a_scale() -> None:
    query, key, value = (random(LENGTH, ROWS, 2, CHANNELS, seed=seed) for seed in (4, 5, 6))
    scaled = CausalAttention(config(), 1, None, "self", softmax_scale=0.7)
    torch.testing.assert_close(scaled(query, key, value, None), slow_attention(query, key, value, 0.7))


def test_what_comes_later_changes_nothing() -> None:
    """The property that padding on the right relies on, exactly."""
    inputs = [random(LENGTH, ROWS, 2, CHANNELS, seed=seed).detach() for seed in (4, 5, 6)]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[4:] = 1e3
    assert torch.equal(attention()(*inputs, None)[:4], attention()(*changed, None)[:4])


def test_dropout_is_live_in_training_only() -> None:
    # With sequence parallelism megatron-core, not the layer, sets the ranks' generators: test_dropout.py.
    layer = attention(attention_dropout=0.5, sequence_parallel=True)
    inputs = [random(LENGTH, ROWS, 2, CHANNELS, seed=seed).detach() for seed in (4, 5, 6)]
    slow = slow_attention(*inputs, 1 / math.sqrt(CHANNELS))
    assert not torch.allclose(layer.train()(*inputs, None), slow)
    torch.testing.assert_close(layer.eval()(*inputs, None), slow)


def test_attention_refuses_a_mask() -> None:
    x = random(LENGTH, ROWS, 2, CHANNELS, seed=4)
    with pytest.raises(ValueError, match="takes no mask"):
        attention()(x, x, x, torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))
