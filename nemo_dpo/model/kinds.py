"""Which kind of value a key of a configuration holds where it holds one, checked before anything is computed of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

LARGEST = 10**15  # no quantity of a model is above it


class Kind(NamedTuple):
    """What a value must be: in words, and as a test."""

    name: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _whole(value: Any) -> bool:
    return isinstance(value, int) and _number(value)


WHOLE = Kind("whole number of 1 or more", lambda value: _whole(value) and value >= 1)
COUNT = Kind("whole number of 0 or more", lambda value: _whole(value) and value >= 0)
REAL = Kind("number of 0 or more", lambda value: _number(value) and value >= 0)
POSITIVE = Kind("number above 0", lambda value: _number(value) and value > 0)
SHARE = Kind("number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
PART = Kind("number above 0, at most 1", lambda value: _number(value) and 0 < value <= 1)
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind("list of texts", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
MAPPING = Kind("mapping of keys", lambda value: isinstance(value, Mapping))


def misfit(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> str:
    """The first key of `kinds` whose value is of another, in words; empty if there is none. A null fits everywhere."""
    for key, kind in kinds.items():
        value = values.get(key)
        if value is not None and not kind.fits(value):
            return f"{key}={value!r:.80} is no {kind.name}"
    return ""
