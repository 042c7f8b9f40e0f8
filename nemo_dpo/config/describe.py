"""Every key in words, for ``--help`` and for documents."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from nemo_dpo.config.keys import Key, field_docs, schema_keys
from nemo_dpo.config.legacy import RULES, VALUES, Mapped, Mirror, Refused, Renamed, Rule

_WIDTH = 118


def describe() -> str:
    """All keys with type, default and documentation, then the keys of NeMo-Aligner that are mapped or refused."""
    return "\n".join([*_schema_lines(), "", "Keys of NeMo-Aligner that are not keys here:", *_legacy_lines(), ""])


def _schema_lines() -> Iterator[str]:
    for key in schema_keys().values():
        doc = field_docs(key.owner)[key.path.rpartition(".")[2]]
        if key.section:
            yield f"\n{key.path}: {' '.join(doc.split())}"
        else:
            yield f"  {key.path} = {_default(key)}   ({key.type_name})"
            yield _wrapped(doc)


def _default(key: Key) -> str:
    """The default as a yaml shows it; ${a.b} means that the value follows that key."""
    words = {None: "null", True: "true", False: "false"}
    return words[key.default] if key.default is None or isinstance(key.default, bool) else str(key.default)


def _legacy_lines() -> Iterator[str]:
    for path, rule in RULES.items():
        yield f"  {path}"
        yield _wrapped(_rule_text(rule))
    for path, values in VALUES.items():
        for old, (new, notice) in values.items():
            yield f"  {path}={old}"
            yield _wrapped(f"becomes {new}: {notice}")


def _rule_text(rule: Rule) -> str:
    match rule:
        case Refused(reason, allowed):
            return f"refused, except {' or '.join(_shown(value) for value in allowed)}: {reason}"
        case Mapped(notice):
            return notice
        case Renamed(to):
            return f"is now called {to}"
        case Mirror(of):
            return f"must equal {of}"


def _shown(value: object) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _wrapped(text: str) -> str:
    return textwrap.fill(re.sub(r"\s+", " ", text), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
