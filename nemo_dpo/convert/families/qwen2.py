"""Qwen2 and Qwen2.5: Llama's table with a bias on the QKV projection alone. Sliding windows are refused."""

from __future__ import annotations

from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.families import llama
from nemo_dpo.convert.family import Family, Key
from nemo_dpo.convert.rules import Table

DEFAULTS = {
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}


def _table(config: dict[str, Any]) -> Table:
    return llama.weights_table(config, (*llama.WEIGHTS, llama.QKV_BIAS), ())


def _to_nemo(hf: dict[str, Any]) -> dict[str, Any]:
    if any(kind != "full_attention" for kind in hf.get("layer_types", ())):
        raise CheckpointError("config.json: layer_types asks for sliding windows, which are not supported for qwen2")
    return {"bias": False, "qkv_bias": True}


def _to_hf(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("bias") or not config.get("qkv_bias"):
        raise CheckpointError("model_config.yaml: qwen2 has bias=false and qkv_bias=true")
    return {}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=tuple(Key(key.hf, key.nemo, DEFAULTS.get(key.hf, key.default)) for key in llama.KEYS),
    constants=llama.CONSTANTS,
    required={"hidden_act": "silu", "use_sliding_window": False},
    defaults={},
    extra_nemo=_to_nemo,
    extra_hf=_to_hf,
    table=_table,
)
