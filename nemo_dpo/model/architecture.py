"""The shape of a model, read from the `model_config.yaml` of a checkpoint in NeMo's key names.

`Architecture` is the one place that knows those names and their defaults; what cannot be built is refused here, by key,
before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_dpo.lora.spec import Dimensions
from nemo_dpo.model.kinds import COUNT, MAPPING, PART, POSITIVE, REAL, SHARE, SWITCH, TEXT, WHOLE, Kind, misfit

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
    "moe_ffn_hidden_size": (),
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
    "moe_latent_size": (),
}


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


class ArchitectureError(ValueError):
    """A `model_config.yaml` that this model code cannot build; names the key and what is known."""


def padded_vocab_size(vocab_size: int, divisor: int) -> int:
    """`vocab_size` rounded up to a multiple of `divisor`."""
    return -(-vocab_size // divisor) * divisor


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling with the numbers of `LLAMA3_SCALING`; megatron-core fixes every one but the factor."""

    factor: float

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> RopeScaling:
        """From the `rope_scaling` sub-dict, in Hugging Face's names.

        Raises:
            ArchitectureError: any other kind, or numbers that megatron-core does not compute with.
        """
        _check_kinds(entry, ROPE_SCALING_KINDS, "rope_scaling.")
        kind = entry.get("rope_type", entry.get("type"))
        if kind != "llama3":
            raise ArchitectureError(f"model_config.yaml: rope_scaling of type {kind!r} is not supported; known: llama3")
        for key, value in LLAMA3_SCALING.items():
            if key != "factor" and float(entry.get(key, value)) != value:
                raise ArchitectureError(
                    f"model_config.yaml: rope_scaling.{key}={entry[key]}; megatron-core computes {value} only"
                )
        if "factor" not in entry:
            raise ArchitectureError("model_config.yaml lacks rope_scaling.factor, which rope_type llama3 needs")
        return cls(factor=float(entry["factor"]))


@dataclass(frozen=True)
class Architecture:
    """Everything about a GPT model that its checkpoint decides. Sizes are of the whole model, not of a shard."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    make_vocab_size_divisible_by: int
    normalization: str
    zero_centered_norm: bool
    layernorm_epsilon: float
    activation: str
    gated: bool
    linear_bias: bool
    qkv_bias: bool
    tied_embeddings: bool
    position_embedding: str
    rotary_base: float
    rotary_percent: float
    rotary_interleaved: bool
    rope_interpolation: float | None
    rope_scaling: RopeScaling | None
    window: int | None  # how many tokens back attention sees; None is all
    qk_norm: bool  # heads of query and key are normalised
    scaled_embedding: bool  # by √hidden_size
    parallel_residual: bool
    hidden_dropout: float
    attention_dropout: float
    experts: int | None  # in place of the MLP; None is an MLP
    experts_per_token: int
    load_balancing: str  # one of LOAD_BALANCING
    load_balancing_weight: float

    @classmethod
    def parse(cls, config: Mapping[str, Any], tokenizer_vocab_size: int | None = None) -> Architecture:
        """From a `model_config.yaml`.

        Args:
            tokenizer_vocab_size: what the checkpoint's tokenizer says, where the config leaves it to that.

        Raises:
            ArchitectureError: a key is missing or asks for what this model code cannot express.
        """
        vocab_size = stated_vocab_size(config) or tokenizer_vocab_size or 0
        config = _accepted(config, vocab_size)
        normalization = _known(config, "normalization", NORMALIZATIONS)
        activation, gated = activation_of(config)
        bias = bool(config["bias"])
        # NeMo itself writes no numbers: there the switch alone means Llama 3.1's.
        switched_on = bool(config.get("scale_positional_embedding"))
        scaling = config.get("rope_scaling") or ({"rope_type": "llama3", **LLAMA3_SCALING} if switched_on else None)
        return cls(
            num_layers=int(config["num_layers"]),
            hidden_size=int(config["hidden_size"]),
            ffn_hidden_size=int(config["ffn_hidden_size"]),
            num_attention_heads=int(config["num_attention_heads"]),
            num_query_groups=int(config["num_query_groups"]),
            kv_channels=int(config["kv_channels"]),
            vocab_size=vocab_size,
            max_position_embeddings=int(config["max_position_embeddings"]),
            make_vocab_size_divisible_by=int(config["make_vocab_size_divisible_by"]),
            normalization=NORMALIZATIONS[normalization],
            zero_centered_norm=normalization == "layernorm1p" or bool(config.get("layernorm_zero_centered_gamma")),
            layernorm_epsilon=float(config["layernorm_epsilon"]),
            activation=activation,
            gated=gated,
            linear_bias=bias,
            qkv_bias=bool(config["qkv_bias"]) and not bias,
            tied_embeddings=bool(config["share_embeddings_and_output_weights"]),
            position_embedding=_known(config, "position_embedding_type", POSITION_EMBEDDINGS),
            rotary_base=float(config["rotary_base"]),
            rotary_percent=float(config["rotary_percentage"]),
            rotary_interleaved=bool(config.get("rotary_interleaved")),
            rope_interpolation=config.get("seq_len_interpolation_factor"),
            rope_scaling=RopeScaling.parse(scaling) if scaling else None,
            window=_window(config.get("window_size")),
            qk_norm=bool(config.get("qk_layernorm")),
            scaled_embedding=bool(config.get("apply_embedding_scaling")),
            parallel_residual=config.get("name") == PARALLEL_RESIDUAL,
            hidden_dropout=float(config["hidden_dropout"]),
            attention_dropout=float(config["attention_dropout"]),
            **_experts(config),
        )

    @property
    def dimensions(self) -> Dimensions:
        """What the shapes of adapters depend on."""
        return Dimensions(
            layers=self.num_layers,
            hidden=self.hidden_size,
            ffn=self.ffn_hidden_size,
            heads=self.num_attention_heads,
            query_groups=self.num_query_groups,
            head_channels=self.kv_channels,
            gated=self.gated,
            experts=self.experts or 0,
        )

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the embedding over all ranks: the vocabulary rounded up so that every rank holds the same number."""
        return padded_vocab_size(self.vocab_size, self.make_vocab_size_divisible_by * tp_size)


def stated_vocab_size(config: Mapping[str, Any]) -> int | None:
    """Number of tokens that a `model_config.yaml` states; None where, as in NeMo's own, the tokenizer decides."""
    size = config.get("vocab_size") or config.get("override_vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def _accepted(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """`config` completed; refuses values of another kind, missing sizes and what no model here computes."""
    _check_kinds(config, KINDS)
    missing = [key for key in ("num_layers", "hidden_size", "num_attention_heads") if not config.get(key)]
    if not vocab_size:
        missing.append("vocab_size")
    if config.get("max_position_embeddings") is None and config.get("encoder_seq_length") is None:
        missing.append("max_position_embeddings")
    if missing:
        raise ArchitectureError(f"model_config.yaml lacks {', '.join(missing)}; is this an mcore .nemo checkpoint?")
    full = completed(config)
    _check_kinds(full, KINDS)  # what the formulas make of the rest
    _refuse_other_models(full)
    heads, groups = full["num_attention_heads"], full["num_query_groups"]
    if heads % groups:
        raise ArchitectureError(f"model_config.yaml: num_attention_heads={heads} is no multiple of {groups} groups")
    return full


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Kind], section: str = "") -> None:
    if wrong := misfit(values, kinds):
        raise ArchitectureError(f"model_config.yaml: {section}{wrong}")


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `model_config.yaml` that has the sizes and perhaps nulls, with what is missing as NeMo takes it."""
    stated = {key: NULLS.get(key) if value is None else value for key, value in config.items()}
    given = {**DEFAULTS, **{key: value for key, value in stated.items() if value is not None}}
    given.setdefault("max_position_embeddings", given.get("encoder_seq_length"))
    return {**{key: formula(given) for key, formula in DERIVED.items() if key not in given}, **given}


def activation_of(config: Mapping[str, Any]) -> tuple[str, bool]:
    """(megatron-core's activation, whether it is a gated linear unit) of a completed `model_config.yaml`.

    `bias_activation_fusion` is no mere choice of a kernel. NeMo hands it on, true where the key is missing (in
    `build_transformer_config`, and to its own `ParallelMLP` of 1.x), and the kernels that add the bias compute GELU by
    its tanh approximation whatever `activation` says: megatron-core's `bias_gelu` (which needs biases) and `bias_geglu`
    (which does not). The fused SwiGLU is the unfused one. With any other activation, `openai_gelu` among them, the
    fusion is an error there, so those of its default come from elsewhere and mean the activation that they name.
    """
    activation, gated = ACTIVATIONS[_known(config, "activation", ACTIVATIONS)]
    fused = config["bias_activation_fusion"] and (gated or config["bias"])
    return "gelu_tanh" if config.get("openai_gelu") or (activation == "gelu" and fused) else activation, gated


def _window(size: Any) -> int | None:
    """NeMo's `window_size`, how many tokens before and after its own a token sees (-1 is all) → those before."""
    match size:
        case None | [-1, -1] | [-1, 0]:
            return None
        case [int(before), 0] if before >= 0:
            return before
    raise ArchitectureError(f"model_config.yaml: window_size={size!r:.80} is not supported; known: [-1, 0] and [n, 0]")


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    for key, known in COMPUTED.items():
        value = config.get(key)
        if value is not None and value not in known:
            texts = ", ".join(map(str, known)) or "null"
            raise ArchitectureError(
                f"model_config.yaml: {key}={value!r:.80} is not supported; known: {texts}{REMEDIES.get(key, '')}"
            )


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Architecture` about experts; refuses what cannot be built with them."""
    experts, chosen = config["num_moe_experts"] or None, config["moe_router_topk"]
    if experts is not None:
        _check_experts(config, experts, chosen)
    return {
        "experts": experts,
        "experts_per_token": chosen,
        "load_balancing": _known(config, "moe_router_load_balancing_type", LOAD_BALANCING),
        "load_balancing_weight": float(config["moe_aux_loss_coeff"]),
    }


def _check_experts(config: Mapping[str, Any], experts: int, chosen: int) -> None:
    if not 2 <= chosen <= experts:
        raise ArchitectureError(
            f"model_config.yaml: moe_router_topk={chosen} of num_moe_experts={experts} is not supported; known: 2 to "
            f"{experts}"
        )
    wrong = {"bias": bool(config["bias"]), "name": config.get("name") == PARALLEL_RESIDUAL}
    for key in filter(wrong.get, wrong):
        raise ArchitectureError(f"model_config.yaml: {key}={config[key]!r} is not supported with num_moe_experts")


def _known(config: Mapping[str, Any], key: str, known: Any) -> str:
    value = config[key]
    if value not in known:
        raise ArchitectureError(f"model_config.yaml: {key}={value!r:.80} is not supported; known: {', '.join(known)}")
    return str(value)
