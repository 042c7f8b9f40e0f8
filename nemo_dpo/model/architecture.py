"""The shape of a model, read from the `model_config.yaml` of a checkpoint in NeMo's key names.

What cannot be built is refused here, by key, before any weight is read. What the keys may hold is in `nemo_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_dpo.lora.spec import Dimensions
from nemo_dpo.model.kinds import Kind, misfit
from nemo_dpo.model.nemo_keys import (
    ACTIVATIONS,
    COMPUTED,
    DEFAULTS,
    EXPERTS_KEYS,
    KINDS,
    LLAMA3_SCALING,
    LOAD_BALANCING,
    NORMALIZATIONS,
    PARALLEL_RESIDUAL,
    POSITION_EMBEDDINGS,
    REMEDIES,
    ROPE_SCALING_KINDS,
    completed,
)


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
        entry = {key: value for key, value in entry.items() if value is not None}
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
        case [int(before), 0] if before >= 0 and not isinstance(before, bool):
            return before
    raise ArchitectureError(f"model_config.yaml: window_size={size!r:.80} is not supported; known: [-1, 0] and [n, 0]")


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    idle = not config["num_moe_experts"]  # without them these keys mean nothing
    for key, known in COMPUTED.items():
        value = config.get(key)
        if value is not None and value not in known and not (idle and key.startswith(EXPERTS_KEYS)):
            texts = ", ".join(map(str, known)) or "null"
            raise ArchitectureError(
                f"model_config.yaml: {key}={value!r:.80} is not supported; known: {texts}{REMEDIES.get(key, '')}"
            )


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Architecture` about experts; refuses what cannot be built with them."""
    experts = config["num_moe_experts"] or None
    stated: Mapping[str, Any] = config if experts else DEFAULTS
    if experts:
        _check_experts(config, experts, config["moe_router_topk"])
    return {
        "experts": experts,
        "experts_per_token": stated["moe_router_topk"],
        "load_balancing": _known(stated, "moe_router_load_balancing_type", LOAD_BALANCING),
        "load_balancing_weight": float(stated["moe_aux_loss_coeff"]),
    }


def _check_experts(config: Mapping[str, Any], experts: int, chosen: int) -> None:
    if not 2 <= chosen <= experts:
        raise ArchitectureError(
            f"model_config.yaml: moe_router_topk={chosen} of num_moe_experts={experts} is not supported; known: 2 to "
            f"{experts}"
        )
    ffn = config.get("moe_ffn_hidden_size")
    if ffn is not None and ffn != config["ffn_hidden_size"]:
        raise ArchitectureError(
            f"model_config.yaml: moe_ffn_hidden_size={ffn!r:.80} is not supported; known: ffn_hidden_size, "
            f"{config['ffn_hidden_size']}"
        )
    wrong = {"bias": bool(config["bias"]), "name": config.get("name") == PARALLEL_RESIDUAL}
    for key in filter(wrong.get, wrong):
        raise ArchitectureError(f"model_config.yaml: {key}={config[key]!r} is not supported with num_moe_experts")


def _known(config: Mapping[str, Any], key: str, known: Any) -> str:
    value = config[key]
    if value not in known:
        raise ArchitectureError(f"model_config.yaml: {key}={value!r:.80} is not supported; known: {', '.join(known)}")
    return str(value)
