"""Pairs → tokens, worked out by hand with a tokenizer of letters."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from letters import EOS, TH, Letters

from nemo_dpo.data import DataError, DataOptions, PreferencePair
from nemo_dpo.data import tokenize as reasons
from nemo_dpo.data.tally import Tally
from nemo_dpo.data.tokenize import TokenTriple, tokenize_pairs

OPTIONS = DataOptions(seq_length=8)
A, B, C, D = b"abcd"


def pair(prompt: str, chosen: str, rejected: str, line: int = 7) -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected, 1.0, 0.0, line)


def tokens(text_pair: PreferencePair, options: DataOptions = OPTIONS, tally: Tally | None = None) -> TokenTriple | None:
    kept = list(tokenize_pairs([text_pair], Letters(), options, "x.jsonl", tally or Tally()))
    return kept[0][1] if kept else None


def test_the_response_is_what_follows_the_prompt() -> None:
    assert tokens(pair("ab", "thc", "d")) == ([A, B], [TH, C], [D])


def test_append_eod_ends_each_response_once() -> None:
    options = replace(OPTIONS, append_eod=True)
    assert tokens(pair("a", "b", "cc"), options) == ([A], [B, EOS], [C, C, EOS])
    assert tokens(pair("a", "b¶", "c"), options) == ([A], [B, EOS], [C, EOS])


def test_the_tokenizer_is_called_once_for_many_pairs() -> None:
    tokenizer = Letters()
    many = [pair("a", "b", "c" * n, line=n) for n in range(1, 6)]
    kept = list(tokenize_pairs(many, tokenizer, OPTIONS, "x.jsonl", Tally()))
    assert tokenizer.calls == 1
    assert [(p.line, len(triple.rejected)) for p, triple in kept] == [(n, n) for n in range(1, 6)]


INVALID = {
    "empty chosen": (pair("a", "", "b"), reasons.EMPTY_RESPONSE),
    "empty rejected": (pair("a", "b", ""), reasons.EMPTY_RESPONSE),
    "white space only": (pair("a", " \n", "b"), reasons.EMPTY_RESPONSE),
    "no prompt": (pair("", "b", "c"), reasons.EMPTY_PROMPT),
    # t|h becomes one token, so the prompt's "t" is no token of prompt + response.
    "chosen merges with the prompt": (pair("at", "he", "b"), reasons.NOT_A_PREFIX),
    "rejected merges with the prompt": (pair("at", "b", "he"), reasons.NOT_A_PREFIX),
    "equal": (pair("a", "b", "b"), reasons.EQUAL_RESPONSES),
}


@pytest.mark.parametrize("bad, reason", INVALID.values(), ids=INVALID.keys())
def test_an_invalid_pair_is_a_counted_skip_or_an_error(bad: PreferencePair, reason: str) -> None:
    tally = Tally()
    assert tokens(bad, tally=tally) is None
    assert list(tally.dropped) == [(reason, 1, [7])]
    with pytest.raises(DataError, match=rf"^x\.jsonl:7: {reason.replace('+', '.')}.*invalid=skip"):
        tokens(bad, replace(OPTIONS, invalid="error"))


def test_responses_that_only_eos_told_apart_are_equal() -> None:
    assert tokens(pair("a", "b", "b¶")) == ([A], [B], [B, EOS])
    assert tokens(pair("a", "b", "b¶"), replace(OPTIONS, append_eod=True)) is None


# prompt 4 + chosen 5 = 9 tokens, prompt 4 + rejected 3 = 7; seq_length 8.
LONG = pair("abcd", "aaaaa", "bbb")


def test_a_pair_of_exactly_seq_length_is_kept() -> None:
    assert tokens(pair("abcd", "aaaa", "b")) == ([A, B, C, D], [A] * 4, [B])
    # The end-of-text token counts.
    assert tokens(pair("abcd", "aaaa", "b"), replace(OPTIONS, append_eod=True)) is None


def test_over_long_pairs_by_policy() -> None:
    tally = Tally()
    assert tokens(LONG, tally=tally) is None
    assert list(tally.dropped) == [(reasons.OVERLONG, 1, [7])]

    tally = Tally()
    cut_prompt = replace(OPTIONS, overlong="truncate_prompt")
    assert tokens(LONG, cut_prompt, tally) == ([B, C, D], [A] * 5, [B] * 3)
    assert list(tally.changed) == [(reasons.CUT_PROMPT, 1, [7])]

    tally = Tally()
    cut_response = replace(OPTIONS, overlong="truncate_response", append_eod=True)
    # room for 4 response tokens: the chosen one loses its end and eos, the rejected one fits with its eos.
    assert tokens(LONG, cut_response, tally) == ([A, B, C, D], [A] * 4, [B, B, B, EOS])
    assert list(tally.changed) == [(reasons.CUT_RESPONSE, 1, [7])]

    with pytest.raises(DataError, match=r"^x\.jsonl:7: prompt \+ response have 9 tokens, more than seq_length=8; "):
        tokens(LONG, replace(OPTIONS, overlong="error"))


UNCUTTABLE = {
    "no room for a prompt": ("truncate_prompt", pair("ab", "a" * 8, "b")),
    "no room for a response": ("truncate_response", pair("a" * 8, "a", "b")),
    "equal after cutting": ("truncate_response", pair("abcd", "aaaab", "aaaac")),
}


@pytest.mark.parametrize("policy, long", UNCUTTABLE.values(), ids=UNCUTTABLE.keys())
def test_a_pair_that_cutting_would_ruin_is_dropped(policy: str, long: PreferencePair) -> None:
    tally = Tally()
    assert tokens(long, replace(OPTIONS, overlong=policy), tally) is None
    assert list(tally.dropped) == [(reasons.STILL_OVERLONG, 1, [7])]
    assert list(tally.changed) == []


def test_cutting_the_prompt_to_its_last_token_is_allowed() -> None:
    cut_prompt = replace(OPTIONS, overlong="truncate_prompt")
    assert tokens(pair("ab", "a" * 7, "b"), cut_prompt) == ([B], [A] * 7, [B])


def test_ftfy_repairs_text_before_tokenisation() -> None:
    broken = pair("a", "\u00e2\u20ac\u00a6", "b")  # "…" read as another encoding
    repaired = tokens(broken, replace(OPTIONS, apply_ftfy=True))
    assert repaired == ([A], list("…".encode()), [B])
    assert tokens(broken) == ([A], list("\u00e2\u20ac\u00a6".encode()), [B])


def test_a_missing_ftfy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(DataError, match="pip install ftfy"):
        tokens(pair("a", "b", "c"), replace(OPTIONS, apply_ftfy=True))
