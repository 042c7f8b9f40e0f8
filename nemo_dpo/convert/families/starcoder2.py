"""StarCoder2: LayerNorm, grouped queries, an ungated MLP, biases throughout or nowhere, a sliding window or none."""

from __future__ import annotations

from typing import Any

from nemo_dpo.convert.families import llama
from nemo_dpo.convert.families.common import COMMON, one_dropout, window_to_hf, window_to_nemo
from nemo_dpo.convert.family import Family, Key
from nemo_dpo.convert.rules import Table

KEYS = (
    Key("num_hidden_layers", "num_layers", 30),
    Key("hidden_size", "hidden_size", 3072),
    Key("intermediate_size", "ffn_hidden_size", 12288),
    Key("num_attention_heads", "num_attention_heads", 24),
    Key("num_key_value_heads", "num_query_groups", 2),
    Key("head_dim", "kv_channels", None),
    Key("vocab_size", "vocab_size", 49152),
    Key("max_position_embeddings", "max_position_embeddings", 4096),
    Key("norm_epsilon", "layernorm_epsilon", 1e-5),
    Key("initializer_range", "init_method_std", 0.018042),
    Key("residual_dropout", "hidden_dropout", 0.0),
    Key("attention_dropout", "attention_dropout", 0.0),
    Key("tie_word_embeddings", "share_embeddings_and_output_weights", True),
)


def _table(config: dict[str, Any]) -> Table:
    return llama.weights_table(config, llama.ungated("c_fc", "c_proj", bias=bool(config.get("bias")), qkv_bias=False))


def _to_nemo(hf: dict[str, Any]) -> dict[str, Any]:
    one_dropout(hf, "embedding_dropout", "residual_dropout")
    return {"bias": hf["use_bias"], "qkv_bias": False, **window_to_nemo(hf)}


def _to_hf(config: dict[str, Any]) -> dict[str, Any]:
    return {"use_bias": config["bias"], "embedding_dropout": config["hidden_dropout"], **window_to_hf(config)}


FAMILY = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    models="StarCoder2 3B to 15B",
    keys=KEYS,
    constants={
        **COMMON,
        "normalization": "layernorm",
        "activation": "gelu",
        "openai_gelu": True,
        "position_embedding_type": "rope",
    },
    required={"hidden_act": ("gelu_pytorch_tanh",)},
    table=_table,
    defaults={"use_bias": True, "sliding_window": None, "embedding_dropout": 0.0},
    extra_nemo=_to_nemo,
    extra_hf=_to_hf,
)
