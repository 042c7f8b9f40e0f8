"""What a model family is: a mapping of config keys and a table of parameters, both read in both directions.

A family is data (`Family`); this module turns it into configs: Hugging Face's config.json → NeMo's model_config.yaml
and back. The whole config.json (and generation_config.json) travels in the sub-dictionary `huggingface` of
model_config.yaml, so that an export gives the same one; where both speak of the same thing, NeMo's key wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.rope import rope_from_hf, rope_from_nemo, rope_to_hf, rope_to_nemo
from nemo_dpo.convert.rules import Dims, Table

Config = dict[str, Any]
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Key:
    """One quantity under both names; `default` is what Hugging Face's class takes when config.json is silent."""

    hf: str
    nemo: str
    default: Any


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: as in config.json.
        architecture: transformers' class.
        keys: quantities that both sides have.
        constants: NeMo keys that are the same for every model of the family.
        required: Hugging Face key → the only value that is supported (also the default when absent).
        defaults: of the Hugging Face keys that `extra_nemo` and `extra_hf` deal with.
        extra_nemo: further NeMo keys computed from the complete config.json; refuses what cannot be expressed.
        extra_hf: the inverse, from model_config.yaml.
        table: the parameter table for a model_config.yaml.
    """

    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    constants: Mapping[str, Any]
    required: Mapping[str, Any]
    defaults: Mapping[str, Any]
    extra_nemo: Callable[[Config], Config]
    extra_hf: Callable[[Config], Config]
    table: Callable[[Config], Table]


def padded_vocab_size(vocab_size: int, divisor: int) -> int:
    """`vocab_size` rounded up to a multiple of `divisor`."""
    return -(-vocab_size // divisor) * divisor


def dims_of(config: Config) -> Dims:
    """The sizes that a model_config.yaml states; its nulls mean what NeMo takes them for."""
    missing = [key for key in SIZES if not isinstance(config.get(key), int)]
    if missing:
        raise CheckpointError(f"model_config.yaml lacks {', '.join(missing)} (whole numbers); it is of no GPT model")
    heads, vocab = config["num_attention_heads"], config["vocab_size"]
    return Dims(
        layers=config["num_layers"],
        hidden=config["hidden_size"],
        ffn=config["ffn_hidden_size"],
        heads=heads,
        groups=config.get("num_query_groups") or heads,
        head_dim=config.get("kv_channels") or config["hidden_size"] // heads,
        vocab=vocab,
        padded_vocab=padded_vocab_size(vocab, config.get("make_vocab_size_divisible_by") or 128),
    )


def complete_hf(family: Family, hf: Config) -> Config:
    """config.json with the defaults of Hugging Face's config class filled in."""
    given = {name: value for name, value in hf.items() if value is not None}
    full = {**{key.hf: key.default for key in family.keys}, **family.required, **family.defaults, **given}
    if full["num_key_value_heads"] is None:
        full["num_key_value_heads"] = full["num_attention_heads"]
    if full["head_dim"] is None:
        full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    return full


def to_model_config(family: Family, hf: Config, template: Config) -> Config:
    """config.json → the architecture keys of model_config.yaml over those of `template`.

    Raises:
        CheckpointError: config.json asks for something that the family's table cannot express.
    """
    full = complete_hf(family, hf)
    if full.get("quantization_config"):
        raise CheckpointError("the checkpoint is quantized (quantization_config); convert its unquantized original")
    for name, value in family.required.items():
        if full[name] != value:
            raise CheckpointError(f"config.json: {name}={full[name]!r} is not supported, only {value!r}")
    if full["num_attention_heads"] % full["num_key_value_heads"]:
        raise CheckpointError(
            f"config.json: num_attention_heads={full['num_attention_heads']} is no multiple of "
            f"num_key_value_heads={full['num_key_value_heads']}"
        )
    mapped = {key.nemo: full[key.hf] for key in family.keys}
    return {
        **template,
        **family.constants,
        **mapped,
        "encoder_seq_length": full["max_position_embeddings"],
        **rope_to_nemo(rope_from_hf(hf)),
        **family.extra_nemo(full),
    }


def to_hf_config(family: Family, config: Config) -> Config:
    """model_config.yaml → config.json; the stored config.json if NeMo's keys still say the same."""
    stored = (config.get("huggingface") or {}).get("config")
    mapped = {key.hf: config[key.nemo] for key in family.keys if config.get(key.nemo) is not None}
    mapped |= family.extra_hf(config)
    rope = rope_from_nemo(config)
    if stored is None:
        names = {"architectures": [family.architecture], "model_type": family.model_type, "torch_dtype": None}
        return {**names, **mapped, **rope_to_hf(rope)}
    full = complete_hf(family, stored)
    changed = {name: value for name, value in mapped.items() if full.get(name) != value}
    if rope_from_hf(stored) != rope:
        stored = {name: value for name, value in stored.items() if name != "rope_parameters"}
        changed |= rope_to_hf(rope)
    return {**stored, **changed}
