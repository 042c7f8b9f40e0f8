"""The model families that can be converted, by the `model_type` of config.json."""

from __future__ import annotations

from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.families import llama, qwen2
from nemo_dpo.convert.family import Family

# Of model_config.yaml; Hugging Face's class of no family computes with one of them.
SWITCHES = ("rotary_interleaved", "openai_gelu", "layernorm_zero_centered_gamma")
FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY, qwen2.FAMILY)}


def family_of_hf(hf: dict[str, Any]) -> Family:
    """The family that config.json names."""
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(f"config.json: model_type={model_type!r} is not supported, only {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_of_nemo(config: dict[str, Any]) -> Family:
    """The family that a model_config.yaml came from; one written elsewhere is taken by its biases."""
    stored = (config.get("huggingface") or {}).get("config")
    wrong = {name: config[name] for name in SWITCHES if config.get(name)}
    if stored is None:
        wrong |= {name: config.get(name) for name, value in llama.SHAPING.items() if config.get(name) != value}
    if wrong:
        raise CheckpointError(f"model_config.yaml: {wrong} is no architecture of {', '.join(FAMILIES)}")
    if stored is not None:
        return family_of_hf(stored)
    return FAMILIES["qwen2" if config.get("qkv_bias") else "llama"]
