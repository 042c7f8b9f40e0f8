"""Lines → pairs: what is accepted, and that everything else is refused with file and line."""

from __future__ import annotations

import json
import re

import pytest
from letters import row

from nemo_dpo.data import DataError, DataOptions, PreferencePair
from nemo_dpo.data.jsonl import MOST_EXTRA_FIELDS, read_pairs
from nemo_dpo.data.tally import Counts

OPTIONS = DataOptions(seq_length=100, default_chosen_reward=3.0, default_rejected_reward=-2.0)
GOOD = b'{"prompt": "p", "chosen_response": "c", "rejected_response": "r"}'


def read(content: bytes, noted: Counts | None = None) -> list[PreferencePair]:
    return list(read_pairs(content.splitlines(keepends=True), "x.jsonl", OPTIONS, noted or Counts()))


def line(**changes: object) -> bytes:
    return json.dumps({**row("p", "c", "r"), **changes}).encode()


def test_rewards_come_from_the_line_or_from_the_defaults() -> None:
    given = read(line(chosen_reward=0.75, rejected_reward=-1))
    assert given == [PreferencePair("p", "c", "r", 0.75, -1.0, line=1)]
    assert read(GOOD) == [PreferencePair("p", "c", "r", 3.0, -2.0, line=1)]
    # Table exports write null where a column has no value.
    assert read(line(chosen_reward=None, rejected_reward=5)) == [PreferencePair("p", "c", "r", 3.0, 5.0, line=1)]


def test_text_is_kept_as_it_is() -> None:
    text = '  é\u2028\u0085\x0b 漢字 🙂\n\ttabs, \u0000 and a quote " \\ '
    assert read(line(prompt=text, chosen_response=" x", rejected_response="y "))[0].prompt == text
    (unescaped,) = read_pairs([json.dumps(row(text, "c", "r"), ensure_ascii=False).encode()], "x", OPTIONS, Counts())
    assert unescaped.prompt == text


def test_byte_order_mark_crlf_and_blank_lines_are_accepted_and_counted() -> None:
    noted = Counts()
    pairs = read(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD, noted)
    assert [pair.line for pair in pairs] == [1, 4]
    assert list(noted) == [("blank line skipped", 2, [2, 3]), ("byte-order mark skipped", 1, [1])]


def test_unknown_fields_are_counted_with_their_names() -> None:
    noted = Counts()
    read(b"\n".join([line(id=1), line(id=2, note="n"), line(id=3), line(id=4)]), noted)
    assert read(line(messages=[{"role": "user"}], chosen=[])) == read(GOOD), "a list in a field that is not ours"
    assert list(noted) == [("unknown field 'id' ignored", 4, [1, 2, 3]), ("unknown field 'note' ignored", 1, [2])]


def test_names_of_unknown_fields_do_not_pile_up() -> None:
    noted = Counts()
    read(b"\n".join(line(**{f"key{n}": 0}) for n in range(1000)), noted)
    assert len(noted.number) == MOST_EXTRA_FIELDS + 1
    assert noted.number["further unknown fields ignored"] == 1000 - MOST_EXTRA_FIELDS


BAD = {
    "cut off": (GOOD[:40], r"x\.jsonl:2:41: not JSON"),
    "two objects": (GOOD + GOOD, rf"x\.jsonl:2:{len(GOOD) + 1}: not JSON"),
    "not JSON": (b"prompt: p", r"x\.jsonl:2:1: not JSON"),
    "a list": (b"[1]", r"x\.jsonl:2: a list, not a JSON object"),
    "null": (b"null", r"x\.jsonl:2: null, not a JSON object"),
    "deep": (b"[" * 100_000, r"x\.jsonl:2: JSON that cannot be read"),
    "digits": (b'{"n": ' + b"1" * 5000 + b"}", r"x\.jsonl:2: JSON that cannot be read"),
    "NUL": (GOOD[:20] + b"\0" + GOOD[20:], r"x\.jsonl:2: a NUL byte at byte 21"),
    "UTF-16": (GOOD.decode().encode("utf-16"), r"x\.jsonl:2: a NUL byte"),
    "Latin-1": (GOOD.replace(b'"p"', b'"\xe9"'), r"x\.jsonl:2: byte 13 is not UTF-8"),
    "byte-order mark inside": (b"\xef\xbb\xbf" + GOOD, r"x\.jsonl:2:1: not JSON"),
    "missing": (b'{"prompt": "p", "chosen_response": "c"}', r"x\.jsonl:2: the field rejected_response is missing"),
    "other names": (
        b'{"prompt": "p", "chosen": "c", "rejected": "r"}',
        r"chosen_response is missing.*has chosen, prompt",
    ),
    "empty object": (b"{}", r"prompt is missing; the line has no field"),
    "number for text": (line(prompt=3), r"x\.jsonl:2: prompt is a number, not a text"),
    "true for text": (line(chosen_response=True), r"chosen_response is true or false, not a text"),
    "null for text": (line(rejected_response=None), r"rejected_response is null, not a text"),
    "object for text": (line(prompt={"role": "user"}), r"prompt is an object, not a text"),
    "half a surrogate": (line(prompt="\ud83d"), r"x\.jsonl:2: prompt has half a surrogate pair"),
    "true for reward": (line(chosen_reward=True), r"x\.jsonl:2: chosen_reward is true or false, not a number"),
    "text for reward": (line(rejected_reward="1.0"), r"rejected_reward is a text, not a number"),
    "NaN": (line(chosen_reward=float("nan")), r"x\.jsonl:2: chosen_reward is nan"),
    "infinite": (line(rejected_reward=-float("inf")), r"x\.jsonl:2: rejected_reward is -inf"),
    "beyond a float": (line(chosen_reward=10**400), r"chosen_reward is inf"),
    "twice": (GOOD[:-1] + b', "prompt": "q"}', r"x\.jsonl:2: the field 'prompt' stands twice"),
    "messages": (
        line(prompt=[{"role": "user", "content": "p"}]),
        r"x\.jsonl:2: prompt is a list of messages, which is not supported yet.*chat template",
    ),
    "messages under other names": (
        b'{"chosen": [{"role": "user", "content": "p"}], "rejected": []}',
        r"x\.jsonl:2: chosen is a list of messages.*chat template",
    ),
}


@pytest.mark.parametrize("bad, message", BAD.values(), ids=BAD.keys())
def test_a_line_that_is_not_the_format_is_an_error(bad: bytes, message: str) -> None:
    pairs = read_pairs([GOOD, bad], "x.jsonl", OPTIONS, Counts())
    assert next(pairs).line == 1
    with pytest.raises(DataError) as caught:
        next(pairs)
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_pairs_is_an_error(content: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl: holds no line with a pair"):
        read(content)
