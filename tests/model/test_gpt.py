"""What `ResponseGPT` adds to megatron-core's preparation of the input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_dpo.model.gpt import ResponseGPT


def test_the_scale_of_the_embedding_is_rounded_as_gemma_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """√72 = 8.485… is 8.5 in bf16, and the product has a rounding of its own."""
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    torch.manual_seed(3)
    embedding = GemmaTextScaledWordEmbedding(50, 72, 0, embed_scale=math.sqrt(72)).bfloat16()
    start: Any = embedding.weight.detach()
    monkeypatch.setattr(GPTModel, "_preprocess", lambda self, **_: (start, "rotary"))
    model = ResponseGPT.__new__(ResponseGPT)
    model.embedding_scale = math.sqrt(72)
    found, *rest = model._preprocess(input_ids=None, position_ids=None)
    assert torch.equal(found, embedding(torch.arange(50))) and rest == ["rotary"]
    assert not torch.equal(found, start * math.sqrt(72))
    start = None  # a later pipeline stage
    assert model._preprocess(input_ids=None, position_ids=None)[0] is None
