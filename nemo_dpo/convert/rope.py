"""Rotary position embedding: one description, read from and written to both configs.

Hugging Face keeps it in `rope_theta` and `rope_scaling` (transformers 4, where GPT-NeoX has names of its own) or in
`rope_parameters` (transformers 5), NeMo in `rotary_base`, `rotary_percentage`, `seq_len_interpolation_factor` (linear
scaling) and `scale_positional_embedding` (Llama 3.1's scaling; its numbers are a dictionary `rope_scaling` of ours, and
those of Llama 3.1 itself where that is missing).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.model.kinds import PART, POSITIVE, Kind, misfit
from nemo_dpo.model.nemo_keys import LLAMA3_SCALING, ROPE_SCALING_KINDS

DEFAULT_BASE = 10000.0


@dataclass(frozen=True)
class RopeKeys:
    """A family's keys in config.json as transformers 4 has them.

    Attributes:
        base: the key of theta.
        percent: the key of the share of a head's channels that turn; None if the family turns all.
        default_percent, default_base: where config.json does not say it.
    """

    base: str = "rope_theta"
    percent: str | None = None
    default_percent: float = 1.0
    default_base: float = DEFAULT_BASE


LLAMAS_ROPE = RopeKeys()


@dataclass(frozen=True)
class Rope:
    """What both sides say.

    Attributes:
        base: theta.
        percent: share of a head's channels that turn.
        kind: of scaling: "default" (none), "linear" or "llama3".
        numbers: of that scaling.
    """

    base: float = DEFAULT_BASE
    percent: float = 1.0
    kind: str = "default"
    numbers: dict[str, float] = field(default_factory=dict)


def rope_from_hf(hf: dict[str, Any], keys: RopeKeys) -> Rope:
    """Read either form of config.json; refuses scalings that megatron-core has not, and a percentage out of place."""
    key = keys.percent or "partial_rotary_factor"
    _check(hf, {keys.base: POSITIVE, key: PART})
    given = {**_section(hf, "rope_scaling"), **_section(hf, "rope_parameters")}
    _check(given, {**ROPE_SCALING_KINDS, "rope_theta": POSITIVE, "partial_rotary_factor": PART})
    base = given.get("rope_theta") or hf.get(keys.base) or keys.default_base
    kind = given.get("rope_type") or given.get("type") or "default"
    percent = given.get("partial_rotary_factor") or hf.get(key) or keys.default_percent
    if keys.percent is None and percent != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported for this family")
    needed = {"default": (), "linear": ("factor",), "llama3": tuple(LLAMA3_SCALING)}.get(kind)
    if needed is None:
        raise CheckpointError(
            f"config.json: RoPE scaling '{kind:.80}' is not supported, only default, linear and llama3"
        )
    missing = [name for name in needed if given.get(name) is None]
    if missing:
        raise CheckpointError(f"config.json: RoPE scaling '{kind}' lacks {', '.join(missing)}")
    return Rope(base, percent, kind, {name: given[name] for name in needed})


def _section(hf: dict[str, Any], name: str) -> dict[str, Any]:
    """The description of RoPE under `name`; nothing if there is none."""
    section = hf.get(name) or {}
    if not isinstance(section, dict) or any(isinstance(value, dict) for value in section.values()):
        raise CheckpointError(f"config.json: {name}={section!r:.80} is not one description for all layers")
    return section


def _check(values: dict[str, Any], kinds: dict[str, Kind]) -> None:
    if wrong := misfit(values, kinds):
        raise CheckpointError(f"config.json: {wrong}")


def rope_to_nemo(rope: Rope) -> dict[str, Any]:
    """The RoPE keys of model_config.yaml."""
    return {
        "rotary_base": rope.base,
        "rotary_percentage": rope.percent,
        "seq_len_interpolation_factor": rope.numbers["factor"] if rope.kind == "linear" else None,
        "scale_positional_embedding": rope.kind == "llama3",
        "rope_scaling": {"rope_type": rope.kind, **rope.numbers} if rope.kind == "llama3" else None,
    }


def rope_from_nemo(config: dict[str, Any], keys: RopeKeys) -> Rope:
    """Read model_config.yaml; refuses partial rotation where the family has none."""
    percent = config.get("rotary_percentage") or 1.0
    if keys.percent is None and percent != 1.0:
        raise CheckpointError("model_config.yaml: rotary_percentage other than 1 is not supported for this family")
    base = config.get("rotary_base") or DEFAULT_BASE
    if config.get("scale_positional_embedding"):
        given = config.get("rope_scaling") or {}
        numbers = {name: given.get(name, value) for name, value in LLAMA3_SCALING.items()}
        return Rope(base, percent, "llama3", numbers)
    if config.get("seq_len_interpolation_factor"):
        return Rope(base, percent, "linear", {"factor": config["seq_len_interpolation_factor"]})
    return Rope(base, percent)


def rope_to_hf(rope: Rope, keys: RopeKeys) -> dict[str, Any]:
    """The RoPE keys of config.json in the older form, which every version of transformers reads."""
    scaling = {"rope_type": rope.kind, **rope.numbers} if rope.kind != "default" else None
    percent = {keys.percent: rope.percent} if keys.percent else {}
    return {keys.base: rope.base, "rope_scaling": scaling, **percent}
