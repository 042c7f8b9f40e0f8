"""``model.data.data_prefix``: which files make up which split, with what weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from nemo_dpo.config.errors import ConfigError
from nemo_dpo.config.schema import Config

SPLITS = ("train", "validation", "test")

_KEY = "model.data.data_prefix"
_EXAMPLE = f'"{_KEY}={{train: [train.jsonl], validation: [valid.jsonl]}}"'


@dataclass(frozen=True)
class Source:
    """One jsonl file of a split."""

    path: Path
    weight: float | None = None
    """Share of the split's pairs that come from this file; None where the files are simply joined."""
    span: tuple[float, float] = (0.0, 1.0)
    """The part of the file's pairs that belongs to the split, as fractions [start, end); dropped lines are no pairs."""


def data_sources(cfg: Config) -> dict[str, list[Source]]:
    """Split → its files. ``test`` is absent if there is none. Raises ConfigError for a malformed value.

    A list with ``splits_string`` "98,1,1" gives every split the same files with consecutive spans of their pairs.
    """
    prefix, splits = cfg.model.data.data_prefix, cfg.model.data.splits_string
    if isinstance(prefix, Mapping):
        if splits is not None:
            raise ConfigError(
                f"model.data.splits_string={splits!r} is for one list of files, but {_KEY} has splits of its own; "
                "set model.data.splits_string=null"
            )
        return _from_mapping(prefix)
    if splits is None:
        raise ConfigError(
            f"{_KEY}={prefix!r} does not say which files are for validation; give {_EXAMPLE}, "
            "or a list together with model.data.splits_string"
        )
    spans = _spans(splits)
    files = _weighted(_KEY, prefix)
    return {
        split: [Source(path, weight, span) for path, weight in files]
        for split, span in zip(SPLITS, spans, strict=True)
        if span[0] < span[1]
    }


def _from_mapping(prefix: Mapping[str, object]) -> dict[str, list[Source]]:
    for name in prefix:
        if name not in SPLITS:
            close = get_close_matches(str(name), SPLITS, n=1, cutoff=0.3)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(SPLITS)}"
            raise ConfigError(f"{_KEY} has no split {name!r}; {hint}")
    sources = {
        split: [Source(path, weight) for path, weight in _weighted(f"{_KEY}.{split}", prefix[split])]
        for split in SPLITS
        if prefix.get(split) not in (None, [])
    }
    for split in ("train", "validation"):
        if split not in sources:
            raise ConfigError(f"{_KEY}.{split} names no file; give {_EXAMPLE}")
    return sources


def _weighted(key: str, value: object) -> list[tuple[Path, float | None]]:
    """[a, b] or [0.3, a, 0.7, b] or one file."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not items:
        raise ConfigError(f"{key}={value!r} is not a list of files; give [a.jsonl, b.jsonl]")
    if all(isinstance(item, str) and _number(item) is None for item in items):
        return [(Path(str(item)), None) for item in items]
    weights = [_number(item) for item in items[::2]]
    files = items[1::2]
    if len(weights) != len(files) or any(w is None or not 0 < w < math.inf for w in weights):
        raise ConfigError(
            f"{key}={value!r}: with weights every file needs one, positive and before it, "
            "as in [0.3, a.jsonl, 0.7, b.jsonl]"
        )
    return [(Path(str(item)), weight) for item, weight in zip(files, weights, strict=True)]


def _number(item: object) -> float | None:
    try:
        return float(item) if isinstance(item, int | float | str) else None
    except ValueError:
        return None


def _spans(splits: str) -> list[tuple[float, float]]:
    """ "98,1,1" → [(0, .98), (.98, .99), (.99, 1)]."""
    shares = [_number(part) for part in splits.split(",")]
    valid = [share for share in shares if share is not None and 0 <= share < math.inf]
    if len(valid) != len(shares) or len(shares) not in (2, 3) or not (valid[0] > 0 and valid[1] > 0):
        raise ConfigError(
            f"model.data.splits_string={splits!r} must be two or three shares, of train and validation (both positive) "
            'and test, like "98,1,1"'
        )
    valid += [0.0] * (3 - len(valid))
    ends = [sum(valid[:count]) / sum(valid) for count in range(4)]
    return list(pairwise(ends))
