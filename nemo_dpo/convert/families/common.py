"""What the tables of several families share: keys, megatron-core's names, the output layer, sliding windows."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.family import Key
from nemo_dpo.convert.rules import Copy, PaddedVocab, Param, Rule, Table

# NeMo's keys that all families share; a family with dropout behind its layers maps that key.
COMMON = {
    "mcore_gpt": True,
    "transformer_engine": True,
    # NeMo's default, true, is an error with most activations and another formula of GELU (`activation_of`).
    "bias_activation_fusion": False,
    "make_vocab_size_divisible_by": 128,
    "hidden_dropout": 0.0,
    "ffn_dropout": 0.0,
}
NO_BIASES = {"bias": False, "qkv_bias": False}

WORDS = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
QKV = "decoder.layers.self_attention.linear_qkv"
PROJ = "decoder.layers.self_attention.linear_proj"
FC1 = "decoder.layers.mlp.linear_fc1"
FC2 = "decoder.layers.mlp.linear_fc2"
ROUTER = "decoder.layers.mlp.router"
EXPERT_FC1 = "decoder.layers.mlp.experts.experts.linear_fc1"
EXPERT_FC2 = "decoder.layers.mlp.experts.experts.linear_fc2"
# As Transformer Engine names them; `weight` or `bias` follows.
ATTENTION_NORM = f"{QKV}.layer_norm_"
MLP_NORM = f"{FC1}.layer_norm_"
# With experts the norm has no linear layer that it could belong to.
EXPERTS_NORM = "decoder.layers.pre_mlp_layernorm."
FINAL_NORM = "decoder.final_layernorm."


def changed(keys: tuple[Key, ...], defaults: Mapping[str, Any], without: Container[str] = ()) -> tuple[Key, ...]:
    """`keys` with other defaults, less those that a class has not."""
    return tuple(Key(key.hf, key.nemo, defaults.get(key.hf, key.default)) for key in keys if key.hf not in without)


def linear(nemo: str, hf: str, dims: str, *, bias: bool = True, transposed: bool = False) -> tuple[Rule, ...]:
    """A projection under another name: its weight, and its bias if it has one."""
    weight = Copy(f"{nemo}.weight", (Param(f"{hf}.weight", dims, transposed),))
    return (weight, Copy(f"{nemo}.bias", (Param(f"{hf}.bias", dims.split()[0]),))) if bias else (weight,)


def norm(nemo: str, hf: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Scale and, of a LayerNorm, shift; `nemo` is one of the names above."""
    return tuple(
        Copy(f"{nemo}{part}", (Param(f"{hf}.{part}", "hidden"),)) for part in ("weight", "bias")[: 2 if bias else 1]
    )


def with_head(config: Mapping[str, Any], embedding: Param, head: Param, rules: tuple[Rule, ...], **more: Any) -> Table:
    """The table of `rules` for a model whose output layer is its own or tied to the embedding, as `config` says.

    Args:
        more: further fields of `Table`.
    """
    tied = bool(config.get("share_embeddings_and_output_weights"))
    return Table(
        rules=rules if tied else (*rules, PaddedVocab("output_layer.weight", (head,))),
        tied={head.name: embedding.name} if tied else {},
        **more,
    )


def window_to_nemo(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face counts the token itself as one of `sliding_window`, NeMo the tokens before it."""
    window = hf["sliding_window"]
    return {"window_size": None if window is None else [window - 1, 0]}


def window_to_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `window_to_nemo`; -1 of NeMo's is no window."""
    before, _ = config.get("window_size") or (-1, 0)
    return {"sliding_window": None if before == -1 else before + 1}


def without_sliding_layers(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse windows that only some layers have."""
    if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        raise CheckpointError(
            "config.json: layer_types asks for sliding windows, which are not supported in some layers only"
        )
    return {}


def one_dropout(hf: Mapping[str, Any], embedding: str, residual: str) -> None:
    """Refuse two rates where megatron-core has one, `hidden_dropout`."""
    if hf[embedding] != hf[residual]:
        raise CheckpointError(
            f"config.json: {embedding}={hf[embedding]} and {residual}={hf[residual]}: megatron-core has one rate for "
            "both; make them equal (dropout does not change the weights)"
        )
