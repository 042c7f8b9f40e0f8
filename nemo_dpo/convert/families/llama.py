"""Llama 1 to 3.2, and what shares its architecture (SmolLM2): RMSNorm, RoPE, grouped queries, SwiGLU, optional biases.

megatron-core either gives every linear layer of a block a bias, or the QKV projection alone, or none. Hugging Face's
`attention_bias` puts one on q, k, v and o: without `mlp_bias` it is taken if that of o is zero, and refused otherwise.
"""

from __future__ import annotations

from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.family import Family, Key
from nemo_dpo.convert.rules import Copy, FusedQkv, GatedMlp, PaddedVocab, Param, Rule, Table

EMBEDDING = Param("model.embed_tokens.weight", "vocab hidden")
HEAD = Param("lm_head.weight", "vocab hidden")
ATTENTION = "model.layers.{layer}.self_attn"
MLP = "model.layers.{layer}.mlp"

SHAPING = {
    "mcore_gpt": True,
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "position_embedding_type": "rope",
}
CONSTANTS = {
    **SHAPING,
    "transformer_engine": True,
    "make_vocab_size_divisible_by": 128,
    "hidden_dropout": 0.0,
    "ffn_dropout": 0.0,
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

WEIGHTS: tuple[Rule, ...] = (
    PaddedVocab("embedding.word_embeddings.weight", (EMBEDDING,)),
    Copy(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        (Param("model.layers.{layer}.input_layernorm.weight", "hidden"),),
    ),
    FusedQkv(
        "decoder.layers.self_attention.linear_qkv.weight",
        (
            Param(f"{ATTENTION}.q_proj.weight", "q hidden"),
            Param(f"{ATTENTION}.k_proj.weight", "kv hidden"),
            Param(f"{ATTENTION}.v_proj.weight", "kv hidden"),
        ),
    ),
    Copy("decoder.layers.self_attention.linear_proj.weight", (Param(f"{ATTENTION}.o_proj.weight", "hidden q"),)),
    Copy(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        (Param("model.layers.{layer}.post_attention_layernorm.weight", "hidden"),),
    ),
    GatedMlp(
        "decoder.layers.mlp.linear_fc1.weight",
        (Param(f"{MLP}.gate_proj.weight", "ffn hidden"), Param(f"{MLP}.up_proj.weight", "ffn hidden")),
    ),
    Copy("decoder.layers.mlp.linear_fc2.weight", (Param(f"{MLP}.down_proj.weight", "hidden ffn"),)),
    Copy("decoder.final_layernorm.weight", (Param("model.norm.weight", "hidden"),)),
)
UNTIED_HEAD = PaddedVocab("output_layer.weight", (HEAD,))
QKV_BIAS = FusedQkv(
    "decoder.layers.self_attention.linear_qkv.bias",
    (
        Param(f"{ATTENTION}.q_proj.bias", "q"),
        Param(f"{ATTENTION}.k_proj.bias", "kv"),
        Param(f"{ATTENTION}.v_proj.bias", "kv"),
    ),
)
PROJ_BIAS = Param(f"{ATTENTION}.o_proj.bias", "hidden")
OTHER_BIASES: tuple[Rule, ...] = (
    Copy("decoder.layers.self_attention.linear_proj.bias", (PROJ_BIAS,)),
    GatedMlp(
        "decoder.layers.mlp.linear_fc1.bias",
        (Param(f"{MLP}.gate_proj.bias", "ffn"), Param(f"{MLP}.up_proj.bias", "ffn")),
    ),
    Copy("decoder.layers.mlp.linear_fc2.bias", (Param(f"{MLP}.down_proj.bias", "hidden"),)),
)


def weights_table(config: dict[str, Any], rules: tuple[Rule, ...], zeros: tuple[Param, ...]) -> Table:
    """`rules` for a model whose output layer is its own or tied to the embedding, as `config` says."""
    tied = bool(config.get("share_embeddings_and_output_weights"))
    return Table(
        rules=rules if tied else (*rules, UNTIED_HEAD),
        zeros=zeros,
        tied={HEAD.name: EMBEDDING.name} if tied else {},
        derived=(".rotary_emb.inv_freq",),
    )


def _table(config: dict[str, Any]) -> Table:
    if config.get("bias"):
        return weights_table(config, (*WEIGHTS, QKV_BIAS, *OTHER_BIASES), ())
    if config.get("qkv_bias"):
        return weights_table(config, (*WEIGHTS, QKV_BIAS), (PROJ_BIAS,))
    return weights_table(config, WEIGHTS, ())


def _biases_to_nemo(hf: dict[str, Any]) -> dict[str, Any]:
    attention, mlp = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    if mlp and not attention:
        raise CheckpointError("config.json: mlp_bias without attention_bias cannot be expressed in megatron-core")
    return {"bias": attention and mlp, "qkv_bias": attention and not mlp}


def _biases_to_hf(config: dict[str, Any]) -> dict[str, Any]:
    both = bool(config.get("bias"))
    return {"attention_bias": both or bool(config.get("qkv_bias")), "mlp_bias": both}


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=KEYS,
    constants=CONSTANTS,
    required={"hidden_act": "silu"},
    defaults={"attention_bias": False, "mlp_bias": False},
    extra_nemo=_biases_to_nemo,
    extra_hf=_biases_to_hf,
    table=_table,
)
