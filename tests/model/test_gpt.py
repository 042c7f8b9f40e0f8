"""What `ResponseGPT` adds to megatron-core's preparation of the input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_dpo.data.batch import collate
from nemo_dpo.data.types import TokenPair
from nemo_dpo.model.gpt import ResponseGPT, padding_of


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


def test_padding_is_what_follows_a_response() -> None:
    """Whatever the ids: here the responses end with the id that pads."""
    prompt, chosen, rejected = (np.array(ids, np.int32) for ids in ([5, 6], [7, 0, 0], [0]))
    batch = collate([TokenPair(0, prompt, chosen, rejected, 1.0, 0.0)], pad_id=0, length=6, rows=3)
    expected = torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [1] * 6], dtype=torch.bool)
    assert torch.equal(padding_of(batch.tokens, batch.response_positions), expected)
    nothing = collate([], pad_id=0)
    assert padding_of(nothing.tokens, nothing.response_positions).all()
