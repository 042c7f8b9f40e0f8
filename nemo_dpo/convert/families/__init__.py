"""The model families that can be converted, by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.families import gemma, gpt2, gpt_neox, llama, mistral, mixtral, nemotron, qwen2, qwen3, starcoder2
from nemo_dpo.convert.family import Config, Family, differences

# In the order in which a model_config.yaml of unknown origin is tried.
_MODULES = (qwen2, llama, mistral, mixtral, qwen3, gemma, gpt2, gpt_neox, starcoder2, nemotron)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
REFUSED = {
    "gemma2": "soft-capped scores and logits, norms behind each block and windows in every other layer are none of "
    "megatron-core 0.16's",
}


def family_of_hf(hf: Config) -> Family:
    """The family that config.json names."""
    model_type: Any = hf.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSED:
        raise CheckpointError(f"config.json: model_type={model_type!r} is not supported: {REFUSED[model_type]}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type={model_type!r:.80} is not supported, only {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def family_of_nemo(config: Config, among: Collection[str] = ()) -> Family:
    """The family whose class computes what a model_config.yaml says: the one that it came from, or the first that does.

    Args:
        config: the model_config.yaml.
        among: names of the families to try where it does not say what it came from; all if none of them is supported.

    Raises:
        CheckpointError: there is none; says in what the nearest differs.
        ArchitectureError: this package cannot compute it, either.
    """
    stored = (config.get("huggingface") or {}).get("config")
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    problems: list[CheckpointError] = []
    tried = [FAMILIES[name] for name in among if name in FAMILIES] or FAMILIES.values()
    for family in [family_of_hf(stored)] if stored else tried:
        try:
            found[family.model_type] = differences(family, config)
        except CheckpointError as error:
            problems.append(error)
            continue
        if not found[family.model_type]:
            return family
    if not found:
        raise problems[0]
    nearest = min(found, key=lambda name: len(found[name]))
    wrong = ", ".join(f"{field}={ours!r} (there {theirs!r})" for field, (ours, theirs) in found[nearest].items())
    raise CheckpointError(f"model_config.yaml: no family computes this; it differs from {nearest} in {wrong}")
