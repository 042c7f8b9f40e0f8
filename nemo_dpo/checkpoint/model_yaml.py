"""Parse a `model_config.yaml` from bytes that nobody vouches for.

Only plain values come out, no object is built, and what aliases would expand to is counted before anything copies it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nemo_dpo.checkpoint import CheckpointError

MODEL_CONFIG = "model_config.yaml"
MAX_VALUES = 1_000_000
SECTIONS = ("tokenizer", "peft", "huggingface", "huggingface.config", "huggingface.generation_config")
PLAIN = (str, int, float, bool, type(None))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as text, `2024-01-01` as a date; OmegaConf, which wrote most files, does neither."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


# `${a.b}`: a key from the top; `${.a}`: one beside this key; `${..a}`: one beside the mapping that this key is in.
_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")


def parse_config(raw: bytes, path: Path) -> dict[str, Any]:
    """The mapping in `raw`, references such as `${.encoder_seq_length}` filled in.

    Raises:
        CheckpointError: no YAML, no mapping, more than MAX_VALUES values, references that lead nowhere.
    """
    try:
        config = yaml.load(raw, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        # Explicit tags in front of other values, such as `!!bool x`, are a KeyError of PyYAML's.
        raise CheckpointError(f"{path}: {MODEL_CONFIG} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: {MODEL_CONFIG} is a {type(config).__name__}, expected a mapping of keys")
    try:
        # NeMo saves configs as its templates have them; those name their own keys also as `${model.…}`.
        filled = _filled(config, (), {**config, "model": config}, {}) if b"${" in raw else config
        values = _count(filled, {})
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MODEL_CONFIG} cannot be resolved: {error}") from error
    if values > MAX_VALUES:
        raise CheckpointError(f"{path}: {MODEL_CONFIG} expands to {values} values, limit {MAX_VALUES}; not trusted")
    for name in SECTIONS:
        _check_section(filled, name.split("."), path)
    return dict(filled)


def _check_section(value: Any, keys: list[str], path: Path) -> None:
    """Refuse, at the end of `keys`, what is neither null nor a mapping of texts to anything, however deep."""
    for key in keys:
        value = {} if value.get(key) is None else value[key]
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {MODEL_CONFIG}: {'.'.join(keys)} is {value!r:.80}, expected a mapping of keys")
    if (other := _other_key(value, set())) is not None:
        raise CheckpointError(f"{path}: {MODEL_CONFIG}: {'.'.join(keys)} has the key {other!r:.80}, expected text")


def _other_key(value: Any, known: set[int]) -> Any:
    """A key in `value` that is no text, None if there is none; each object is visited once."""
    if not isinstance(value, dict | list) or id(value) in known:
        return None
    known.add(id(value))
    if isinstance(value, dict) and (others := [key for key in value if not isinstance(key, str)]):
        return others[0]
    inside = (_other_key(entry, known) for entry in (value.values() if isinstance(value, dict) else value))
    return next((key for key in inside if key is not None), None)


def _filled(value: Any, parents: tuple[Any, ...], root: dict[str, Any], known: dict[int, Any]) -> Any:
    """`value` with references replaced; what several of them name is one object, so nothing multiplies.

    Args:
        parents: what `value` lies in, the outermost first.
        known: containers done already.
    """
    if isinstance(value, str) and "${" in value:
        match = _REFERENCE.fullmatch(value)
        if match is None:
            raise ValueError(f"{value!r} is more than a reference to another key, which is all that is read")
        node, around = _followed(match[1], match[2].split("."), parents, root, value)
        return _filled(node, around, root, known)
    if not isinstance(value, dict | list):
        return value
    if id(value) not in known:
        inside = (*parents, value)
        known[id(value)] = (
            {str(key): _filled(entry, inside, root, known) for key, entry in value.items()}
            if isinstance(value, dict)
            else [_filled(entry, inside, root, known) for entry in value]
        )
    return known[id(value)]


def _followed(
    dots: str, keys: list[str], parents: tuple[Any, ...], root: dict[str, Any], text: str
) -> tuple[Any, tuple[Any, ...]]:
    """What a reference names, and what that lies in."""
    if len(dots) > len(parents):
        raise ValueError(f"{text!r} leads out of the file")
    around = parents[: len(parents) - len(dots) + 1] if dots else (root,)
    for key in keys[:-1]:
        around = (*around, around[-1].get(key) if isinstance(around[-1], dict) else None)
    if not isinstance(around[-1], dict) or keys[-1] not in around[-1]:
        raise ValueError(f"{text!r} names a key that is not there")
    return around[-1][keys[-1]], around


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in `value` with every alias written out; each object is visited once.

    A loop is a ValueError, and so is what only explicit tags make: a date, a set, bytes.
    """
    if not isinstance(value, dict | list):
        if not isinstance(value, PLAIN):
            raise ValueError(f"{value!r:.80} is a {type(value).__name__}, which no configuration has")
        return 1
    if id(value) not in known:
        known[id(value)] = -1  # being counted
        inside: Iterable[Any] = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(entry, known) for entry in inside)
    if known[id(value)] < 0:
        raise ValueError("a value contains itself")
    return known[id(value)]
