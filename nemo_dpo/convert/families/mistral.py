"""Mistral 7B and its like: Llama's table, every layer with a sliding window or none."""

from __future__ import annotations

from typing import Any

from nemo_dpo.convert.families import llama
from nemo_dpo.convert.families.common import NO_BIASES, changed, window_to_hf, window_to_nemo, without_sliding_layers
from nemo_dpo.convert.family import Family
from nemo_dpo.convert.rules import Table

DEFAULTS = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def _table(config: dict[str, Any]) -> Table:
    return llama.weights_table(config, llama.WEIGHTS)


def _to_nemo(hf: dict[str, Any]) -> dict[str, Any]:
    return {**without_sliding_layers(hf), **window_to_nemo(hf)}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    models="Mistral 7B, Mistral Nemo",
    keys=changed(llama.KEYS, DEFAULTS),
    constants={**llama.CONSTANTS, **NO_BIASES},
    required={"hidden_act": ("silu",)},
    table=_table,
    defaults={"sliding_window": 4096},
    extra_nemo=_to_nemo,
    extra_hf=window_to_hf,
)
