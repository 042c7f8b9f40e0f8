"""Lines of a jsonl file → PreferencePair, one at a time.

A line that is not the format is an error with file and line, always: a file that is half understood is worse than one
that is refused. A UTF-8 byte-order mark, CRLF line ends and blank lines are accepted, unknown fields are counted.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from nemo_dpo.data.tally import Counts
from nemo_dpo.data.types import DataError, DataOptions, PreferencePair

TEXT_FIELDS = ("prompt", "chosen_response", "rejected_response")
REWARD_FIELDS = ("chosen_reward", "rejected_reward")
KNOWN_FIELDS = frozenset(TEXT_FIELDS + REWARD_FIELDS)
# Where other trainers' files have lists of messages: worth a hint if our fields are missing, not worth a guess.
MESSAGE_FIELDS = ("chosen", "rejected", "messages")
# Names of unknown fields remembered: a file that uses data as names must not fill the memory.
MOST_EXTRA_FIELDS = 20


class Source(NamedTuple):
    """Where a row comes from; prints as file:line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def read_pairs(lines: Iterable[bytes], file: str, options: DataOptions, noted: Counts) -> Iterator[PreferencePair]:
    """The pairs of `lines`, the raw lines of `file`. Raises DataError naming file:line."""
    empty = True
    for number, line in enumerate(lines, start=1):
        source = Source(file, number)
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
            noted.add("byte-order mark skipped", number)
        if not line.strip():
            noted.add("blank line skipped", number)
            continue
        row = parse_line(line, source)
        _note_extra_fields(row, source, noted)
        yield parse_row(row, source, options)
        empty = False
    if empty:
        raise DataError(f"{file}: holds no line with a pair; is it the right file?")


def parse_line(line: bytes, source: Source) -> dict[str, object]:
    """The JSON object on a line. Raises DataError for anything else, with the column where there is one."""
    if b"\0" in line:
        raise DataError(f"{source}: a NUL byte at byte {line.index(0) + 1}; the file is damaged or not UTF-8")
    try:
        text = line.decode("utf-8").rstrip("\r\n")  # or an error at the end would be in column 1 of a next line
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8") from error
    try:
        row = json.loads(text, object_pairs_hook=lambda fields: _unique(fields, source))
    except json.JSONDecodeError as error:
        raise DataError(f"{source}:{error.colno}: not JSON ({error.msg}); each line must be one JSON object") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{source}: JSON that cannot be read ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: {_kind(row)}, not a JSON object with the fields {', '.join(TEXT_FIELDS)}")
    return row


def parse_row(row: Mapping[str, object], source: Source, options: DataOptions) -> PreferencePair:
    """Check one row and fill in the default rewards. Raises DataError naming `source` and the field."""
    prompt, chosen, rejected = (_text(row, name, source) for name in TEXT_FIELDS)
    return PreferencePair(
        prompt=prompt,
        chosen_response=chosen,
        rejected_response=rejected,
        chosen_reward=_reward(row, "chosen_reward", options.default_chosen_reward, source),
        rejected_reward=_reward(row, "rejected_reward", options.default_rejected_reward, source),
        line=source.line,
    )


def _text(row: Mapping[str, object], name: str, source: Source) -> str:
    if name not in row:
        for other in MESSAGE_FIELDS:
            if isinstance(row.get(other), list):
                raise _messages(other, source)
        raise DataError(f"{source}: the field {name} is missing; the line has {', '.join(sorted(row)) or 'no field'}")
    value = row[name]
    if isinstance(value, list):
        raise _messages(name, source)
    if not isinstance(value, str):
        raise DataError(f"{source}: {name} is {_kind(value)}, not a text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{source}: {name} has half a surrogate pair (\\ud800 … \\udfff), which is no text"
            ) from error
    return value


def _messages(name: str, source: Source) -> DataError:
    return DataError(
        f"{source}: {name} is a list of messages, which is not supported yet; render it to text with the model's chat "
        f"template, into the fields {', '.join(TEXT_FIELDS)}"
    )


def _reward(row: Mapping[str, object], name: str, default: float, source: Source) -> float:
    """The ground-truth reward; null counts as absent, as table exports write it."""
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{source}: {name} is {_kind(value)}, not a number")
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        raise DataError(f"{source}: {name} is {reward}; a reward must be a finite number")
    return reward


def _unique(fields: list[tuple[str, object]], source: Source) -> dict[str, object]:
    row = dict(fields)
    if len(row) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source}: the field {twice!r} stands twice in one object; which one holds?")
    return row


def _note_extra_fields(row: Mapping[str, object], source: Source, noted: Counts) -> None:
    for name in row.keys() - KNOWN_FIELDS:
        reason = f"unknown field {name[:40]!r} ignored"
        if reason not in noted.number and len(noted.number) >= MOST_EXTRA_FIELDS:
            reason = "further unknown fields ignored"
        noted.add(reason, source.line)


def _kind(value: object) -> str:
    """A JSON value's type in the words of JSON."""
    if value is None:
        return "null"
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds[type(value)]
