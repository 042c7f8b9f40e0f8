"""The schema as a flat list of keys, for look-up, for the nearest known key and for printing."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_type_hints

from nemo_dpo.config.legacy import RULES
from nemo_dpo.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One key of the schema: a value or, with ``section`` set, a group of keys."""

    path: str
    type_name: str
    default: Any
    owner: type
    section: type | None


def _keys(owner: type, prefix: str = "") -> Iterator[Key]:
    hints = get_type_hints(owner)
    for item in fields(owner):
        path, hint = prefix + item.name, hints[item.name]
        section = hint if isinstance(hint, type) and is_dataclass(hint) else None
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        yield Key(path, str(item.type), default, owner, section)
        if section:
            yield from _keys(section, path + ".")


@cache
def schema_keys() -> dict[str, Key]:
    """All keys and sections, in the order in which they are defined."""
    return {key.path: key for key in _keys(Config)}


def nearest(path: str) -> str:
    """The known key that a misspelt ``path`` was probably meant to be, "" if none resembles it.

    Looked for among the keys of the same section, then by the same name in other sections, then by a similar name.
    """
    known = [key for key in [*RULES, *schema_keys()] if not _is_section(key)]
    section, _, leaf = path.rpartition(".")
    siblings = {_leaf(key): key for key in known if key.rpartition(".")[0] == section}
    if close := get_close_matches(leaf, siblings, n=1):
        return siblings[close[0]]
    if namesakes := [key for key in known if _leaf(key) == leaf]:
        return get_close_matches(path, namesakes, n=1, cutoff=0.0)[0]
    leaves = {_leaf(key): key for key in known}
    close = get_close_matches(leaf, leaves, n=1, cutoff=0.9)
    return leaves[close[0]] if close else ""


def children(section: str) -> list[str]:
    """Names of the keys directly in ``section`` ("" is the root)."""
    return [_leaf(key) for key in schema_keys() if key.rpartition(".")[0] == section]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _is_section(path: str) -> bool:
    key = schema_keys().get(path)
    return key is not None and key.section is not None


@cache
def field_docs(owner: type) -> dict[str, str]:
    """Documentation of a dataclass's fields: the strings below them in the source, also of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(owner.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        for item, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(below, ast.Expr):
                docs[item.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return docs
