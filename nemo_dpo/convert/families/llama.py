"""Llama 1 to 3.2, and what shares its architecture (SmolLM2): RMSNorm, RoPE, grouped queries, SwiGLU, optional biases.

megatron-core either gives every linear layer of a block a bias, or the QKV projection alone, or none. Hugging Face's
`attention_bias` puts one on q, k, v and o: without `mlp_bias` it is taken if that of o is zero, and refused otherwise.
"""

from __future__ import annotations

from typing import Any

from nemo_dpo.checkpoint import CheckpointError
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
from nemo_dpo.convert.rules import Copy, FusedQkv, GatedMlp, PaddedVocab, Param, Rule, Table

EMBEDDING = Param("model.embed_tokens.weight", "vocab hidden")
HEAD = Param("lm_head.weight", "vocab hidden")
ATTENTION = "model.layers.{layer}.self_attn"
MLP = "model.layers.{layer}.mlp"

CONSTANTS = {
    **COMMON,
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "position_embedding_type": "rope",
}

KEYS = (
    Key("num_hidden_layers", "num_layers", 32),
    Key("hidden_size", "hidden_size", 4096),
    Key("intermediate_size", "ffn_hidden_size", 11008),
    Key("num_attention_heads", "num_attention_heads", 32),
    Key("num_key_value_heads", "num_query_groups", None),
    Key("head_dim", "kv_channels", None),
    Key("vocab_size", "vocab_size", 32000),
    Key("max_position_embeddings", "max_position_embeddings", 2048),
    Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
    Key("initializer_range", "init_method_std", 0.02),
    Key("attention_dropout", "attention_dropout", 0.0),
    Key("tie_word_embeddings", "share_embeddings_and_output_weights", False),
)

QKV_WEIGHTS = (
    Param(f"{ATTENTION}.q_proj.weight", "q hidden"),
    Param(f"{ATTENTION}.k_proj.weight", "kv hidden"),
    Param(f"{ATTENTION}.v_proj.weight", "kv hidden"),
)
# All but what is in place of the MLP.
ATTENTION_AND_ENDS: tuple[Rule, ...] = (
    PaddedVocab(WORDS, (EMBEDDING,)),
    *norm(ATTENTION_NORM, "model.layers.{layer}.input_layernorm", bias=False),
    FusedQkv(f"{QKV}.weight", QKV_WEIGHTS),
    *linear(PROJ, f"{ATTENTION}.o_proj", "hidden q", bias=False),
    *norm(FINAL_NORM, "model.norm", bias=False),
)
WEIGHTS: tuple[Rule, ...] = (
    *ATTENTION_AND_ENDS,
    *norm(MLP_NORM, "model.layers.{layer}.post_attention_layernorm", bias=False),
    GatedMlp(
        f"{FC1}.weight",
        (Param(f"{MLP}.gate_proj.weight", "ffn hidden"), Param(f"{MLP}.up_proj.weight", "ffn hidden")),
    ),
    *linear(FC2, f"{MLP}.down_proj", "hidden ffn", bias=False),
)
QKV_BIAS = FusedQkv(
    f"{QKV}.bias",
    (
        Param(f"{ATTENTION}.q_proj.bias", "q"),
        Param(f"{ATTENTION}.k_proj.bias", "kv"),
        Param(f"{ATTENTION}.v_proj.bias", "kv"),
    ),
)
PROJ_BIAS = Param(f"{ATTENTION}.o_proj.bias", "hidden")
OTHER_BIASES: tuple[Rule, ...] = (
    Copy(f"{PROJ}.bias", (PROJ_BIAS,)),
    GatedMlp(f"{FC1}.bias", (Param(f"{MLP}.gate_proj.bias", "ffn"), Param(f"{MLP}.up_proj.bias", "ffn"))),
    Copy(f"{FC2}.bias", (Param(f"{MLP}.down_proj.bias", "hidden"),)),
)


def weights_table(config: dict[str, Any], rules: tuple[Rule, ...], zeros: tuple[Param, ...] = ()) -> Table:
    """`rules`, with Llama's names of the embedding and the output layer."""
    return with_head(config, EMBEDDING, HEAD, rules, zeros=zeros, derived=(".rotary_emb.inv_freq",))


def ungated(up: str, down: str, *, bias: bool, qkv_bias: bool) -> tuple[Rule, ...]:
    """Llama's names around an MLP without a gate, with norms that shift: Nemotron, StarCoder2.

    Args:
        up, down: the projections of the MLP.
        bias: every projection has one.
        qkv_bias: query, key and value have one.
    """
    return (
        PaddedVocab(WORDS, (EMBEDDING,)),
        *norm(ATTENTION_NORM, "model.layers.{layer}.input_layernorm"),
        FusedQkv(f"{QKV}.weight", QKV_WEIGHTS),
        *((QKV_BIAS,) if bias or qkv_bias else ()),
        *linear(PROJ, f"{ATTENTION}.o_proj", "hidden q", bias=bias),
        *norm(MLP_NORM, "model.layers.{layer}.post_attention_layernorm"),
        *linear(FC1, f"{MLP}.{up}", "ffn hidden", bias=bias),
        *linear(FC2, f"{MLP}.{down}", "hidden ffn", bias=bias),
        *norm(FINAL_NORM, "model.norm"),
    )


def _table(config: dict[str, Any]) -> Table:
    if config.get("bias"):
        return weights_table(config, (*WEIGHTS, QKV_BIAS, *OTHER_BIASES))
    if config.get("qkv_bias"):
        return weights_table(config, (*WEIGHTS, QKV_BIAS), (PROJ_BIAS,))
    return weights_table(config, WEIGHTS)


def biases_to_nemo(hf: dict[str, Any]) -> dict[str, Any]:
    """`attention_bias` and `mlp_bias`; see the module."""
    attention, mlp = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    if mlp and not attention:
        raise CheckpointError("config.json: mlp_bias without attention_bias cannot be expressed in megatron-core")
    return {"bias": attention and mlp, "qkv_bias": attention and not mlp}


def biases_to_hf(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `biases_to_nemo`."""
    both = bool(config.get("bias"))
    return {"attention_bias": both or bool(config.get("qkv_bias")), "mlp_bias": both}


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    models="Llama 1 to 3.2, SmolLM2",
    keys=KEYS,
    constants=CONSTANTS,
    required={"hidden_act": ("silu",)},
    defaults={"attention_bias": False, "mlp_bias": False},
    extra_nemo=biases_to_nemo,
    extra_hf=biases_to_hf,
    table=_table,
)
