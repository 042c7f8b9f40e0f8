"""NeMo's keys of a model: the values that they may hold, and what a missing one or a null means to NeMo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_dpo.model.kinds import COUNT, MAPPING, PART, POSITIVE, REAL, SHARE, SWITCH, TEXT, WHOLE, Kind

# NeMo's `activation` → (megatron-core activation, gated linear unit)
ACTIVATIONS = {
    "fast-swiglu": ("silu", True),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "fast-geglu": ("gelu", True),
    "gelu": ("gelu", False),
    "openai-gelu": ("gelu_tanh", False),
    "squared-relu": ("squared_relu", False),
    "relu": ("relu", False),
}
NORMALIZATIONS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}
# How the router's auxiliary loss is taken: of a micro-batch as a whole, of each sequence, or not at all.
LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "none")
POSITION_EMBEDDINGS = ("rope", "learned_absolute", "none")
# NeMo's `name` selects the kind of layer, and NeMo refuses one that it does not know, null among them; a missing one is
# the empty text. Ours, of GPT-NeoX: attention and MLP both read the layer's input.
PLAIN_LAYER = ""
PARALLEL_RESIDUAL = "megatron_gpt_neox"

# Llama 3.1's scaling of RoPE, in Hugging Face's names.
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# What NeMo takes a missing key for: a value, or a formula over the other keys. A null is the same, where NeMo builds no
# model of it anyway or takes the formula, but for NULLS: OmegaConf's `get` gives NeMo the null and not the default, and
# that counts as false, or as no known kind of position embedding.
DEFAULTS: Mapping[str, object] = {
    "normalization": "layernorm",
    "layernorm_epsilon": 1e-5,
    "activation": "gelu",
    "bias_activation_fusion": True,
    "bias": True,
    "qkv_bias": False,
    "share_embeddings_and_output_weights": True,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000.0,
    "rotary_percentage": 1.0,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "make_vocab_size_divisible_by": 128,
    "num_moe_experts": None,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.0,
}
NULLS: Mapping[str, object] = {
    "bias": False,
    "bias_activation_fusion": False,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "none",
    "moe_router_load_balancing_type": "none",
}
DERIVED: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "ffn_hidden_size": lambda config: 4 * config["hidden_size"],
    "num_query_groups": lambda config: config["num_attention_heads"],
    "kv_channels": lambda config: config["hidden_size"] // config["num_attention_heads"],
}

# Keys of NeMo, and of megatron-core's TransformerConfig which NeMo hands on, that change what a model computes and have
# no field in `Architecture`: the values at which it is what is computed here. null and a missing key always are.
# Not among them, as in 32 and bf16 it changes nothing, but true in many files: apply_query_key_layer_scaling.
COMPUTED: Mapping[str, tuple[object, ...]] = {
    "mcore_gpt": (True,),
    # NeMo does not know `megatron_gpt`, which earlier versions of the converter wrote.
    "name": (
        PLAIN_LAYER,
        "megatron_gpt",
        "te_gpt",
        "megatron_gpt_full_te_layer_autocast",
        "modelopt",
        PARALLEL_RESIDUAL,
    ),
    "attention_type": ("multihead",),
    "transformer_block_type": ("pre_ln",),
    "normalize_attention_scores": (True,),
    "headscale": (False,),
    "qk_l2_norm": (False,),
    "window_attn_skip_freq": (),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (),
    "linear_attention_freq": (),
    "no_rope_freq": (),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "apply_residual_connection_post_layernorm": (False,),
    "fp32_residual_connection": (False,),
    "glu_linear_offset": (0,),
    "activation_func_clamp_value": (),
    "final_logit_softcapping": (0,),
    "attn_logit_softcapping": (0,),
    "mcore_customization_config": ({},),
    "drop_layers": ([],),
    "mtp_num_layers": (0,),
    "moe_layer_freq": (1,),
    "moe_shared_expert_intermediate_size": (0,),
    "moe_router_pre_softmax": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (),
    "moe_router_num_groups": (),
    "moe_router_group_topk": (),
    "moe_router_topk_limited_devices": (),
    "moe_router_enable_expert_bias": (False,),
    "moe_expert_capacity_factor": (),
    "moe_token_dropping": (False,),
    "moe_input_jitter_eps": (0,),
    "moe_z_loss_coeff": (0,),
    "moe_apply_probs_on_input": (False,),
    "moe_router_force_load_balancing": (False,),
    "moe_latent_size": (),
}


EXPERTS_KEYS = "moe_"  # how those of COMPUTED begin that mean nothing without experts
REMEDIES = {"mcore_gpt": " (tools/convert/convert_gpt_nemo_to_mcore.py converts it)"}

# Keys by the kind of value that they hold where they hold anything.
WHOLE_NUMBERS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "override_vocab_size",
    "max_position_embeddings",
    "encoder_seq_length",
    "make_vocab_size_divisible_by",
    "moe_router_topk",
    "activations_checkpoint_num_layers",
)
REAL_NUMBERS = ("layernorm_epsilon", "init_method_std", "moe_aux_loss_coeff")
SWITCHES = (
    "bias",
    "qkv_bias",
    "bias_activation_fusion",
    "openai_gelu",
    "share_embeddings_and_output_weights",
    "scale_positional_embedding",
    "rotary_interleaved",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "apply_embedding_scaling",
)
CHOICES = (
    "name",
    "normalization",
    "activation",
    "position_embedding_type",
    "activations_checkpoint_granularity",
    "activations_checkpoint_method",
    "moe_router_load_balancing_type",
)
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(WHOLE_NUMBERS, WHOLE),
    **dict.fromkeys(REAL_NUMBERS, REAL),
    **dict.fromkeys(SWITCHES, SWITCH),
    **dict.fromkeys(CHOICES, TEXT),
    "rotary_base": POSITIVE,
    "seq_len_interpolation_factor": POSITIVE,
    "rotary_percentage": PART,
    "hidden_dropout": SHARE,
    "attention_dropout": SHARE,
    "rope_scaling": MAPPING,
    "num_moe_experts": COUNT,  # 0, as null: none
}
ROPE_SCALING_KINDS: Mapping[str, Kind] = {"rope_type": TEXT, "type": TEXT, **dict.fromkeys(LLAMA3_SCALING, POSITIVE)}


# Fields of `Architecture` that change training, not what the model computes.
TRAINING_ONLY = ("hidden_dropout", "attention_dropout", "load_balancing", "load_balancing_weight")


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `model_config.yaml` that has the sizes and perhaps nulls, with what is missing as NeMo takes it."""
    stated = {key: NULLS.get(key) if value is None else value for key, value in config.items()}
    given = {**DEFAULTS, **{key: value for key, value in stated.items() if value is not None}}
    given.setdefault("max_position_embeddings", given.get("encoder_seq_length"))
    return {**{key: formula(given) for key, formula in DERIVED.items() if key not in given}, **given}
