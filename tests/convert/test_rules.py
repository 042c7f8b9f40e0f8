"""The rules of the tables, by hand: rows carry their own names as numbers."""

from __future__ import annotations

import pytest
import torch

from nemo_dpo.convert.families import FAMILIES
from nemo_dpo.convert.families.llama import QKV_BIAS, WEIGHTS
from nemo_dpo.convert.rules import Dims, FusedQkv, GatedMlp, PaddedVocab
from nemo_dpo.model.architecture import padded_vocab_size

DIMS = Dims(
    layers=1,
    hidden=2,
    ffn=3,
    heads=4,
    query_groups=2,
    head_channels=2,
    gated=True,
    vocab=5,
    padded_vocab=8,
    positions=6,
)


def rows(*values: int) -> torch.Tensor:
    """One row per value, [value, value]."""
    return torch.tensor([[value, value] for value in values])


def test_qkv_is_interleaved_by_query_group() -> None:
    # 4 query heads of 2 rows (00 … 31), 2 key heads (100 …), 2 value heads (200 …); group 0 has query heads 0 and 1
    q, k, v = rows(0, 1, 10, 11, 20, 21, 30, 31), rows(100, 101, 110, 111), rows(200, 201, 210, 211)
    fused = rows(0, 1, 10, 11, 100, 101, 200, 201, 20, 21, 30, 31, 110, 111, 210, 211)
    rule = next(rule for rule in WEIGHTS if isinstance(rule, FusedQkv))
    assert torch.equal(rule.pack((q, k, v), DIMS), fused)
    assert all(torch.equal(a, b) for a, b in zip(rule.unpack(fused, DIMS), (q, k, v), strict=True))


def test_qkv_bias_follows_its_weight() -> None:
    q, k, v = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    assert QKV_BIAS.pack((q, k, v), DIMS).tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def test_gate_is_above_up() -> None:
    rule = next(rule for rule in WEIGHTS if isinstance(rule, GatedMlp))
    assert [param.name.split(".")[-2] for param in rule.hf] == ["gate_proj", "up_proj"]
    assert torch.equal(rule.pack((rows(1, 2, 3), rows(4, 5, 6)), DIMS), rows(1, 2, 3, 4, 5, 6))
    assert torch.equal(rule.unpack(rows(1, 2, 3, 4, 5, 6), DIMS)[1], rows(4, 5, 6))


def test_vocabulary_is_padded_with_zeros_and_cut() -> None:
    rule = next(rule for rule in WEIGHTS if isinstance(rule, PaddedVocab))
    assert torch.equal(rule.pack((rows(1, 2, 3, 4, 5),), DIMS), rows(1, 2, 3, 4, 5, 0, 0, 0))
    assert torch.equal(rule.unpack(rows(1, 2, 3, 4, 5, 9, 9, 9), DIMS)[0], rows(1, 2, 3, 4, 5))


@pytest.mark.parametrize(("vocab", "divisor", "padded"), [(301, 128, 384), (384, 128, 384), (1, 128, 128), (7, 2, 8)])
def test_padded_vocab_size(vocab: int, divisor: int, padded: int) -> None:
    assert padded_vocab_size(vocab, divisor) == padded


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("biases", [{}, {"qkv_bias": True}, {"bias": True}], ids=["none", "qkv", "all"])
def test_no_name_stands_twice_in_a_table(family: object, biases: dict[str, bool]) -> None:
    table = family.table({**biases, "num_moe_experts": 3})  # type: ignore[attr-defined]
    stored = [rule.nemo for rule in table.rules]
    names = [param.name for rule in table.rules for param in rule.hf] + [param.name for param in table.zeros]
    assert len(set(stored)) == len(stored) and len(set(names)) == len(names)
