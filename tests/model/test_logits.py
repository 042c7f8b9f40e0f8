"""megatron-core's logits equal Hugging Face's, on one process and on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import Findings
from tests.model.model_cases import CASES, Case, random_tokens
from tests.support.tiny import VOCABULARY

# fp32 on both sides, summed in another order over at most 400 positions and 4 layers. A wrong head, rotation or bias is
# of the size of the logits themselves; 2e-6 is what is seen.
TOLERANCE = 1e-5


def hf_logits(case: Case, length: int, **changes: Any) -> Tensor:
    """[2, length, vocabulary] of transformers' model, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.hf, dtype=torch.float32, attn_implementation="eager", **changes)
    with torch.no_grad():
        logits: Tensor = model.eval()(random_tokens(2, length)).logits
    return logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_hugging_faces(
    findings: Findings, cases: dict[str, Case], lengths: dict[str, int], name: str
) -> None:
    expected = hf_logits(cases[name], lengths[name])
    shards = findings.each(name, "logits")
    tp = findings.layout.tp
    assert len(shards) == tp
    logits = torch.cat(shards, dim=-1)
    assert logits.shape[-1] == {1: 384, 2: 512}[tp]  # 259 rounded up to a multiple of 128 · tp
    size = expected.abs().max()
    assert size > 1
    assert (logits[..., :VOCABULARY] - expected).abs().max() <= TOLERANCE * size


@pytest.mark.parametrize("name", CASES)
def test_the_model_was_shared_out(findings: Findings, name: str) -> None:
    _, changes = CASES[name]
    heads = 4 + 2 * (changes.get("num_key_value_heads", 2) or 4)
    rows = heads * (changes.get("head_dim") or 16)
    assert findings.each(name, "qkv") == [[rows // findings.layout.tp, 64]] * findings.layout.world
    assert findings.each(name, "layers") == [4 // findings.layout.pp] * findings.layout.world


def test_rope_scaling_matters_at_this_length(cases: dict[str, Case], lengths: dict[str, int]) -> None:
    case, length = cases["llama3_rope"], lengths["llama3_rope"]
    scaled = hf_logits(case, length)
    plain = hf_logits(case, length, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert (scaled - plain).abs().max() > 1000 * TOLERANCE * scaled.abs().max()
