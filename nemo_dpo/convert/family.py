"""What a model family is: a mapping of config keys and a table of parameters, both read in both directions.

A family is data (`Family`); this module turns it into configs: Hugging Face's config.json → NeMo's model_config.yaml
and back. The whole config.json (and generation_config.json) travels in the sub-dictionary `huggingface` of
model_config.yaml, so that an export gives the same one; where both speak of the same thing, NeMo's key wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.rope import LLAMAS_ROPE, RopeKeys, rope_from_hf, rope_from_nemo, rope_to_hf, rope_to_nemo
from nemo_dpo.convert.rules import Dims, Table
from nemo_dpo.model.architecture import Architecture
from nemo_dpo.model.kinds import SHARE, SWITCH, TEXTS, WHOLE, Kind, misfit
from nemo_dpo.model.nemo_keys import DERIVED, KINDS, TRAINING_ONLY, completed

Config = dict[str, Any]
# The layout that a written model_config.yaml names: weights fit any.
ONE_RANK = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "sequence_parallel": False,
}
# Fields of `Architecture` in which two configs of one model may differ: what only training or a layout goes by, and the
# size that the tokenizer decides where NeMo's config is silent. Shapes of weights are checked one by one.
INCIDENTAL = (*TRAINING_ONLY, "make_vocab_size_divisible_by", "vocab_size")


@dataclass(frozen=True)
class Key:
    """One quantity under both names; `default` is what Hugging Face's class takes when config.json is silent.

    A default of None is `model.architecture.DERIVED`'s formula for NeMo's key. The default also says what a value must
    be: yes or no, a number, or, as None and whole numbers do, a whole number of at least 1.
    """

    hf: str
    nemo: str
    default: Any


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: as in config.json.
        architecture: transformers' class.
        models: some that are of it, for people.
        keys: quantities that both sides have.
        constants: NeMo keys that are the same for every model of the family.
        required: Hugging Face key → the only values that are supported; the first is the default when absent.
        table: the parameter table for a model_config.yaml.
        defaults: of the Hugging Face keys that `extra_nemo` and `extra_hf` deal with; null in config.json stays null.
            They also say what a value must be, as a key's does.
        extra_nemo: further NeMo keys computed from the complete config.json; refuses what cannot be expressed.
        extra_hf: the inverse, from model_config.yaml.
        rope: where config.json keeps its rotary embedding; None if it has none.
    """

    model_type: str
    architecture: str
    models: str
    keys: tuple[Key, ...]
    constants: Mapping[str, Any]
    required: Mapping[str, tuple[Any, ...]]
    table: Callable[[Config], Table]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extra_nemo: Callable[[Config], Config] = lambda hf: {}
    extra_hf: Callable[[Config], Config] = lambda config: {}
    rope: RopeKeys | None = LLAMAS_ROPE

    @property
    def hf_names(self) -> dict[str, str]:
        """NeMo's key → Hugging Face's."""
        return {key.nemo: key.hf for key in self.keys}


def dims_of(config: Config) -> Dims:
    """The sizes of the model that a model_config.yaml describes; ArchitectureError if it describes none."""
    arch = Architecture.parse(config)
    return Dims(
        **vars(arch.dimensions),
        vocab=arch.vocab_size,
        padded_vocab=arch.padded_vocab_size(tp_size=1),
        positions=arch.max_position_embeddings,
    )


def _kinds(family: Family) -> dict[str, Kind]:
    """Which kind of value each key of config.json holds that the family reads, but for those of `required` and RoPE."""
    by_default = {bool: SWITCH, float: SHARE, int: WHOLE, type(None): WHOLE}
    return {
        **{key.hf: KINDS[key.nemo] for key in family.keys},
        **{name: by_default[type(value)] for name, value in family.defaults.items()},
        "layer_types": TEXTS,
    }


def complete_hf(family: Family, hf: Config) -> Config:
    """config.json with the defaults of Hugging Face's config class filled in.

    Raises:
        CheckpointError: a value is of another kind than its key holds.
    """
    if wrong := misfit(hf, _kinds(family)):
        raise CheckpointError(f"config.json: {wrong}")
    nullable = {*family.defaults, *(key.hf for key in family.keys if key.nemo in DERIVED)}
    given = {name: value for name, value in hf.items() if value is not None or name in nullable}
    only = {name: values[0] for name, values in family.required.items()}
    defaults = {**{key.hf: key.default for key in family.keys}, **family.defaults}
    full = {**defaults, **only, **given}
    nemo = _mapped(family, full)
    return {**full, **{key.hf: nemo[key.nemo] for key in family.keys}}


def _mapped(family: Family, full: Config) -> Config:
    """config.json with its defaults → the quantities in NeMo's names, and those that the family leaves to a formula."""
    stated = {key.nemo: full[key.hf] for key in family.keys if full[key.hf] is not None}
    return {**{name: formula(stated) for name, formula in DERIVED.items() if name not in stated}, **stated}


def to_model_config(family: Family, hf: Config, template: Config) -> Config:
    """config.json → the architecture keys of model_config.yaml over those of `template`.

    Raises:
        CheckpointError: config.json asks for something that the family's table cannot express.
    """
    full, names = complete_hf(family, hf), family.hf_names
    if full.get("quantization_config"):
        raise CheckpointError("the checkpoint is quantized (quantization_config); convert its unquantized original")
    for name, values in family.required.items():
        if full[name] not in values:
            known = " or ".join(map(repr, values))
            raise CheckpointError(f"config.json: {name}={full[name]!r:.80} is not supported, only {known}")
    mapped = _mapped(family, full)
    heads, groups = mapped["num_attention_heads"], mapped["num_query_groups"]
    if heads % groups:
        raise CheckpointError(
            f"config.json: {names['num_attention_heads']}={heads} is no multiple of "
            f"{names['num_query_groups']}={groups}"
        )
    return {
        **template,
        **family.constants,
        **mapped,
        "encoder_seq_length": mapped["max_position_embeddings"],
        **(rope_to_nemo(rope_from_hf(hf, family.rope)) if family.rope else {}),
        **family.extra_nemo(full),
    }


def to_hf_config(family: Family, config: Config) -> Config:
    """model_config.yaml → config.json; the stored config.json if NeMo's keys still say the same."""
    stored, full_nemo = (config.get("huggingface") or {}).get("config"), completed(config)
    mapped = {key.hf: full_nemo[key.nemo] for key in family.keys if full_nemo.get(key.nemo) is not None}
    mapped |= family.extra_hf(full_nemo)
    keys = family.rope
    rope = rope_from_nemo(config, keys) if keys else None
    if stored is None:
        names = {"architectures": [family.architecture], "model_type": family.model_type, "torch_dtype": None}
        return {**names, **mapped, **(rope_to_hf(rope, keys) if keys and rope else {})}
    full = complete_hf(family, stored)
    changed = {name: value for name, value in mapped.items() if full.get(name) != value}
    if keys and rope and rope_from_hf(stored, keys) != rope:
        stored = {name: value for name, value in stored.items() if name != "rope_parameters"}
        changed |= rope_to_hf(rope, keys)
    return {**stored, **changed}


def differences(family: Family, config: Config) -> dict[str, tuple[Any, Any]]:
    """What the family's config.json cannot say: fields of `Architecture` → (of model_config.yaml, of the export)."""
    again = to_model_config(family, to_hf_config(family, config), {})
    ours, theirs = (Architecture.parse(side, tokenizer_vocab_size=1) for side in (config, again))
    pairs = {field.name: (getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(Architecture)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in INCIDENTAL}
