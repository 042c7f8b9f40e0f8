"""Gemma 1: Llama's table; gated GELU, norms stored less one, the embedding multiplied by √hidden_size.

NeMo's own converter adds the one to the norms; here the weights stay as they are and `layernorm_zero_centered_gamma`
says so, as a sum would not come back bit for bit.
"""

from __future__ import annotations

from typing import Any

from nemo_dpo.convert.families import llama
from nemo_dpo.convert.families.common import COMMON, NO_BIASES, changed
from nemo_dpo.convert.family import Family
from nemo_dpo.convert.rules import Table

DEFAULTS = {
    "num_hidden_layers": 28,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def _table(config: dict[str, Any]) -> Table:
    return llama.weights_table(config, llama.WEIGHTS)


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    models="Gemma 2B and 7B (the first version), CodeGemma",
    keys=changed(llama.KEYS, DEFAULTS),
    constants={
        **COMMON,
        **NO_BIASES,
        "normalization": "rmsnorm",
        "layernorm_zero_centered_gamma": True,
        "activation": "geglu",
        "openai_gelu": True,
        "apply_embedding_scaling": True,
        "position_embedding_type": "rope",
    },
    required={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # transformers takes the old "gelu" for the other, too
        "hidden_activation": (None, "gelu_pytorch_tanh"),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, False),
    },
    table=_table,
)
