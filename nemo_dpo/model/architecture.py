"""The shape of a model, read from the `model_config.yaml` of a checkpoint in NeMo's key names.

`Architecture` is the one place that knows those names and their defaults; what cannot be built is refused here, by key,
before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_dpo.lora.spec import Dimensions

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
POSITION_EMBEDDINGS = ("rope", "learned_absolute", "none")

# Keys of NeMo, and of megatron-core's TransformerConfig which NeMo hands on, that change what a model computes and have
# no field in `Architecture`: the values at which it is what is computed here. null and a missing key always are.
# Not among them, as in 32 and bf16 it changes nothing, but true in many files: apply_query_key_layer_scaling.
COMPUTED: Mapping[str, tuple[object, ...]] = {
    "mcore_gpt": (True,),
    "name": ("", "megatron_gpt", "megatron_gpt_full_te_layer_autocast", "modelopt"),
    "attention_type": ("multihead",),
    "transformer_block_type": ("pre_ln",),
    "normalize_attention_scores": (True,),
    "headscale": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "window_size": ([-1, -1], [-1, 0]),
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
    "apply_embedding_scaling": (False,),
    "final_logit_softcapping": (0,),
    "attn_logit_softcapping": (0,),
    "mcore_customization_config": ({},),
    "drop_layers": ([],),
    "mtp_num_layers": (0,),
    "num_moe_experts": (0,),
}


class ArchitectureError(ValueError):
    """A `model_config.yaml` that this model code cannot build; names the key and what is known."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling; megatron-core fixes every number but the factor."""

    factor: float

    FIXED = (("low_freq_factor", 1.0), ("high_freq_factor", 4.0), ("original_max_position_embeddings", 8192))

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> RopeScaling:
        """From the `rope_scaling` sub-dict, in Hugging Face's names.

        Raises:
            ArchitectureError: any other kind, or numbers that megatron-core does not compute with.
        """
        kind = entry.get("rope_type", entry.get("type"))
        if kind != "llama3":
            raise ArchitectureError(f"model_config.yaml: rope_scaling of type {kind!r} is not supported; known: llama3")
        for key, value in cls.FIXED:
            if float(entry.get(key, value)) != value:
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
    hidden_dropout: float
    attention_dropout: float

    @classmethod
    def parse(cls, config: Mapping[str, Any], tokenizer_vocab_size: int | None = None) -> Architecture:
        """From a `model_config.yaml`.

        Args:
            tokenizer_vocab_size: what the checkpoint's tokenizer says, where the config leaves it to that.

        Raises:
            ArchitectureError: a key is missing or asks for what this model code cannot express.
        """
        vocab_size = stated_vocab_size(config) or tokenizer_vocab_size or 0
        missing = [key for key in ("num_layers", "hidden_size", "num_attention_heads") if config.get(key) is None]
        if not vocab_size:
            missing.append("vocab_size")
        positions: Any = config.get("max_position_embeddings") or config.get("encoder_seq_length")
        if positions is None:
            missing.append("max_position_embeddings")
        if missing:
            raise ArchitectureError(f"model_config.yaml lacks {', '.join(missing)}; is this an mcore .nemo checkpoint?")
        normalization = _known(config, "normalization", NORMALIZATIONS, "layernorm")
        activation, gated = ACTIVATIONS[_known(config, "activation", ACTIVATIONS, "gelu")]
        position = _known(config, "position_embedding_type", POSITION_EMBEDDINGS, "learned_absolute")
        _refuse_other_models(config)
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        bias = bool(config.get("bias", True))
        # NeMo itself writes no numbers: there the switch alone means Llama 3.1's.
        switched_on = bool(config.get("scale_positional_embedding"))
        scaling = config.get("rope_scaling") or ({"rope_type": "llama3", "factor": 8.0} if switched_on else None)
        return cls(
            num_layers=int(config["num_layers"]),
            hidden_size=hidden,
            ffn_hidden_size=int(config.get("ffn_hidden_size") or 4 * hidden),
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_query_groups") or heads),
            kv_channels=int(config.get("kv_channels") or hidden // heads),
            vocab_size=vocab_size,
            max_position_embeddings=int(positions),
            make_vocab_size_divisible_by=int(config.get("make_vocab_size_divisible_by") or 128),
            normalization=NORMALIZATIONS[normalization],
            zero_centered_norm=normalization == "layernorm1p" or bool(config.get("layernorm_zero_centered_gamma")),
            layernorm_epsilon=float(config.get("layernorm_epsilon", 1e-5)),
            activation="gelu_tanh" if config.get("openai_gelu") else activation,
            gated=gated,
            linear_bias=bias,
            qkv_bias=bool(config.get("qkv_bias", False)) and not bias,
            tied_embeddings=bool(config.get("share_embeddings_and_output_weights", True)),
            position_embedding=position,
            rotary_base=float(config.get("rotary_base") or 10000.0),
            rotary_percent=float(config.get("rotary_percentage", 1.0)),
            rotary_interleaved=bool(config.get("rotary_interleaved")),
            rope_interpolation=config.get("seq_len_interpolation_factor"),
            rope_scaling=RopeScaling.parse(scaling) if scaling else None,
            hidden_dropout=float(config.get("hidden_dropout", 0.0)),
            attention_dropout=float(config.get("attention_dropout", 0.0)),
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
        )

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the embedding over all ranks: the vocabulary rounded up so that every rank holds the same number."""
        multiple = self.make_vocab_size_divisible_by * tp_size
        return -(-self.vocab_size // multiple) * multiple


def stated_vocab_size(config: Mapping[str, Any]) -> int | None:
    """Number of tokens that a `model_config.yaml` states; None where, as in NeMo's own, the tokenizer decides."""
    size = config.get("vocab_size") or config.get("override_vocab_size")
    return int(size) if size else None


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    for key, known in COMPUTED.items():
        value = config.get(key)
        if value is not None and value not in known:
            texts = ", ".join(map(str, known)) or "null"
            raise ArchitectureError(f"model_config.yaml: {key}={value!r} is not supported; known: {texts}")


def _known(config: Mapping[str, Any], key: str, known: Any, default: str) -> str:
    value = config.get(key, default)
    if value not in known:
        raise ArchitectureError(f"model_config.yaml: {key}={value!r} is not supported; known: {', '.join(known)}")
    return str(value)
