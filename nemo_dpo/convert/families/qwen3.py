"""Qwen3 (dense): Llama's table with a norm over each query and key head. Sliding windows are refused."""

from __future__ import annotations

from typing import Any

from nemo_dpo.convert.families import llama
from nemo_dpo.convert.families.common import NO_BIASES, changed, without_sliding_layers
from nemo_dpo.convert.family import Family
from nemo_dpo.convert.rules import Copy, Param, Rule, Table

DEFAULTS = {
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
HEAD_NORMS: tuple[Rule, ...] = (
    Copy("decoder.layers.self_attention.q_layernorm.weight", (Param(f"{llama.ATTENTION}.q_norm.weight", "head"),)),
    Copy("decoder.layers.self_attention.k_layernorm.weight", (Param(f"{llama.ATTENTION}.k_norm.weight", "head"),)),
)


def _table(config: dict[str, Any]) -> Table:
    return llama.weights_table(config, (*llama.WEIGHTS, *HEAD_NORMS))


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    models="Qwen3 0.6B to 32B",
    keys=changed(llama.KEYS, DEFAULTS),
    constants={**llama.CONSTANTS, **NO_BIASES, "qk_layernorm": True},
    required={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
    table=_table,
    extra_nemo=without_sliding_layers,
)
