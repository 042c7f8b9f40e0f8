"""JSON from files that nobody vouches for: an object of bounded depth, or one line that says why not."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64  # configurations and tokenizers nest a dozen levels; readers and writers that recurse manage these


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that `raw` holds, in UTF-8.

    Raises:
        ValueError: no JSON, no object, nested deeper than MAX_DEPTH, or with text that is no Unicode.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses halves of surrogate pairs
    except RecursionError as error:
        raise ValueError("nested without end") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, expected an object")
    if _deeper(value, MAX_DEPTH):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects nest in `value` over more than `levels` levels."""
    level = [value]
    for _ in range(levels):
        level = [child for item in level for child in _children(item) if isinstance(child, dict | list)]
    return bool(level)


def _children(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item
