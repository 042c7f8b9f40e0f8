"""Nemotron-4 and Minitron: LayerNorm stored less one, squared ReLU, RoPE on half of each head, biases as in Llama."""

from __future__ import annotations

from typing import Any

from nemo_dpo.convert.families import llama
from nemo_dpo.convert.families.common import COMMON
from nemo_dpo.convert.family import Family, Key
from nemo_dpo.convert.rope import RopeKeys
from nemo_dpo.convert.rules import Table

KEYS = (
    Key("num_hidden_layers", "num_layers", 32),
    Key("hidden_size", "hidden_size", 6144),
    Key("intermediate_size", "ffn_hidden_size", 24576),
    Key("num_attention_heads", "num_attention_heads", 48),
    Key("num_key_value_heads", "num_query_groups", None),
    Key("head_dim", "kv_channels", None),
    Key("vocab_size", "vocab_size", 256000),
    Key("max_position_embeddings", "max_position_embeddings", 4096),
    Key("norm_eps", "layernorm_epsilon", 1e-5),
    Key("initializer_range", "init_method_std", 0.0134),
    Key("attention_dropout", "attention_dropout", 0.0),
    Key("tie_word_embeddings", "share_embeddings_and_output_weights", False),
)


def _table(config: dict[str, Any]) -> Table:
    bias, qkv_bias = bool(config.get("bias")), bool(config.get("qkv_bias"))
    zeros = (llama.PROJ_BIAS,) if qkv_bias and not bias else ()
    return llama.weights_table(config, llama.ungated("up_proj", "down_proj", bias=bias, qkv_bias=qkv_bias), zeros)


FAMILY = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    models="Nemotron-4, Minitron",
    keys=KEYS,
    constants={
        **COMMON,
        "normalization": "layernorm1p",
        "activation": "squared-relu",
        "position_embedding_type": "rope",
    },
    required={"hidden_act": ("relu2",)},
    table=_table,
    defaults={"attention_bias": False, "mlp_bias": False},
    extra_nemo=llama.biases_to_nemo,
    extra_hf=llama.biases_to_hf,
    rope=RopeKeys(percent="partial_rotary_factor", default_percent=0.5),
)
