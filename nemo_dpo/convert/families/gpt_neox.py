"""GPT-NeoX and Pythia: LayerNorm and projections with biases, RoPE on a part of each head, attention beside the MLP.

The rows of `query_key_value` are head by head, in each head query, key, value: megatron-core's order for as many query
groups as heads.
"""

from __future__ import annotations

from typing import Any

from nemo_dpo.convert.families.common import (
    ATTENTION_NORM,
    COMMON,
    FC1,
    FC2,
    FINAL_NORM,
    MLP_NORM,
    PROJ,
    QKV,
    WORDS,
    linear,
    norm,
    with_head,
)
from nemo_dpo.convert.family import Family, Key
from nemo_dpo.convert.rope import RopeKeys
from nemo_dpo.convert.rules import PaddedVocab, Param, Rule, Table
from nemo_dpo.model.architecture import activation_of
from nemo_dpo.model.nemo_keys import PARALLEL_RESIDUAL, PLAIN_LAYER

EMBEDDING = Param("gpt_neox.embed_in.weight", "vocab hidden")
HEAD = Param("embed_out.weight", "vocab hidden")
LAYER = "gpt_neox.layers.{layer}"

KEYS = (
    Key("num_hidden_layers", "num_layers", 44),
    Key("hidden_size", "hidden_size", 6144),
    Key("intermediate_size", "ffn_hidden_size", 24576),
    Key("num_attention_heads", "num_attention_heads", 64),
    Key("vocab_size", "vocab_size", 50432),
    Key("max_position_embeddings", "max_position_embeddings", 2048),
    Key("layer_norm_eps", "layernorm_epsilon", 1e-5),
    Key("initializer_range", "init_method_std", 0.02),
    Key("hidden_dropout", "hidden_dropout", 0.0),
    Key("attention_dropout", "attention_dropout", 0.0),
    Key("tie_word_embeddings", "share_embeddings_and_output_weights", False),
)
WEIGHTS: tuple[Rule, ...] = (
    PaddedVocab(WORDS, (EMBEDDING,)),
    *norm(ATTENTION_NORM, f"{LAYER}.input_layernorm"),
    *linear(QKV, f"{LAYER}.attention.query_key_value", "qkv hidden"),
    *linear(PROJ, f"{LAYER}.attention.dense", "hidden q"),
    *norm(MLP_NORM, f"{LAYER}.post_attention_layernorm"),
    *linear(FC1, f"{LAYER}.mlp.dense_h_to_4h", "ffn hidden"),
    *linear(FC2, f"{LAYER}.mlp.dense_4h_to_h", "hidden ffn"),
    *norm(FINAL_NORM, "gpt_neox.final_layer_norm"),
)


def _table(config: dict[str, Any]) -> Table:
    return with_head(
        config,
        EMBEDDING,
        HEAD,
        WEIGHTS,
        derived=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
        renamed=((r"^lm_head\.", "embed_out."),),  # transformers 5; it reads the older name, too
    )


def _to_nemo(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": PARALLEL_RESIDUAL if hf["use_parallel_residual"] else PLAIN_LAYER,
        "openai_gelu": hf["hidden_act"] == "gelu_fast",
    }


def _to_hf(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "use_parallel_residual": config.get("name") == PARALLEL_RESIDUAL,
        "hidden_act": "gelu_fast" if activation_of(config)[0] == "gelu_tanh" else "gelu",
    }


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    models="Pythia, GPT-NeoX 20B",
    keys=KEYS,
    constants={
        **COMMON,
        "normalization": "layernorm",
        "activation": "gelu",
        "bias": True,
        "position_embedding_type": "rope",
    },
    required={"hidden_act": ("gelu", "gelu_fast"), "attention_bias": (True,)},
    table=_table,
    defaults={"use_parallel_residual": True},
    extra_nemo=_to_nemo,
    extra_hf=_to_hf,
    rope=RopeKeys(base="rotary_emb_base", percent="rotary_pct", default_percent=0.25),
)
