"""Qwen2 and Qwen2.5: Llama's table with a bias on the QKV projection alone. Sliding windows are refused."""

from __future__ import annotations

from typing import Any

from nemo_dpo.convert.families import llama
from nemo_dpo.convert.families.common import changed, without_sliding_layers
from nemo_dpo.convert.family import Family
from nemo_dpo.convert.rules import Table

DEFAULTS = {
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}


def _table(config: dict[str, Any]) -> Table:
    return llama.weights_table(config, (*llama.WEIGHTS, llama.QKV_BIAS))


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5",
    keys=changed(llama.KEYS, DEFAULTS),
    constants={**llama.CONSTANTS, "bias": False, "qkv_bias": True},
    required={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    extra_nemo=without_sliding_layers,
    table=_table,
)
