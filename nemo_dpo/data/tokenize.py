"""Text pairs → token ids, and the reasons for which a pair is left out.

prompt + response is tokenised as one string, as the model will see it at generation; the response's tokens are what
follows the prompt's own tokens. Where the two do not line up (the prompt is not a token prefix), nobody can say where
the response begins, and the pair is invalid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from nemo_dpo.data.jsonl import Source
from nemo_dpo.data.tally import Tally
from nemo_dpo.data.types import DataError, DataOptions, PreferencePair, longest_sequence

EMPTY_PROMPT = "prompt without tokens"  # nothing would predict the first response token
EMPTY_RESPONSE = "empty response"  # also one of white space only
NOT_A_PREFIX = "prompt is not a token prefix of prompt + response"
EQUAL_RESPONSES = "chosen equals rejected"
OVERLONG = "longer than seq_length"
STILL_OVERLONG = "longer than seq_length, and cutting leaves no pair"
CUT_PROMPT = "start of the prompt cut"
CUT_RESPONSE = "end of a response cut"


class Tokenizer(Protocol):
    """What the data parts ask of a tokenizer.

    `encode` adds no special tokens of its own (no bos, no eos) but recognises those written in the text. `fingerprint`
    changes whenever the ids of some text change: it names the cache.
    """

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


class TokenTriple(NamedTuple):
    """The tokens of prompt, chosen and rejected response."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer: Tokenizer, options: DataOptions, file: str, tally: Tally
) -> Iterator[tuple[PreferencePair, TokenTriple]]:
    """Tokenise `pairs` of `file` in one call of the tokenizer; yield those that are kept, count the others.

    Raises DataError, naming file:line, for a pair that `options` make an error.
    """
    texts: list[str] = []
    for pair in pairs:
        prompt, chosen, rejected = _clean(pair, options)
        texts += [prompt, prompt + chosen, prompt + rejected]
    encoded = tokenizer.encode_batch(texts)
    eos_id = tokenizer.eos_id if options.append_eod else None
    for number, pair in enumerate(pairs):
        place = slice(3 * number, 3 * number + 3)
        triple = _separate(texts[place], encoded[place], eos_id)
        if isinstance(triple, str):
            _reject(triple, pair, options, file, tally)
            continue
        fitted = _fit(triple, pair, options, file, tally)
        if fitted is not None:
            yield pair, fitted


def _clean(pair: PreferencePair, options: DataOptions) -> tuple[str, str, str]:
    texts = (pair.prompt, pair.chosen_response, pair.rejected_response)
    if not options.apply_ftfy:
        return texts
    try:
        import ftfy
    except ImportError as error:
        raise DataError("apply_ftfy=true needs the package ftfy: pip install ftfy, or set apply_ftfy=false") from error
    prompt, chosen, rejected = (ftfy.fix_text(text) for text in texts)
    return prompt, chosen, rejected


def _separate(texts: list[str], ids: list[list[int]], eos_id: int | None) -> TokenTriple | str:
    """Split off the responses and end them with eos; or the reason for which the pair has no usable contrast.

    texts and ids are those of prompt, prompt + chosen response, prompt + rejected response.
    """
    prompt, *wholes = ids
    if not prompt:
        return EMPTY_PROMPT
    if any(not text[len(texts[0]) :].strip() for text in texts[1:]):
        return EMPTY_RESPONSE
    if any(whole[: len(prompt)] != prompt for whole in wholes):
        return NOT_A_PREFIX
    if any(len(whole) == len(prompt) for whole in wholes):
        return EMPTY_RESPONSE
    chosen, rejected = (_end(whole[len(prompt) :], eos_id) for whole in wholes)
    return EQUAL_RESPONSES if chosen == rejected else TokenTriple(prompt, chosen, rejected)


def _reject(reason: str, pair: PreferencePair, options: DataOptions, file: str, tally: Tally) -> None:
    if options.invalid == "error":
        raise DataError(f"{Source(file, pair.line)}: {reason}; mend the line, or leave such pairs out by invalid=skip")
    tally.dropped.add(reason, pair.line)


def _end(response: list[int], eos_id: int | None) -> list[int]:
    """End a response with eos, but not twice."""
    return response if eos_id is None or response[-1] == eos_id else [*response, eos_id]


def _fit(
    triple: TokenTriple, pair: PreferencePair, options: DataOptions, file: str, tally: Tally
) -> TokenTriple | None:
    """Apply the policy for over-long pairs; None if the pair is dropped."""
    limit, longest = options.seq_length, longest_sequence(*triple)
    if longest <= limit:
        return triple
    if options.overlong == "error":
        raise DataError(
            f"{Source(file, pair.line)}: prompt + response have {longest} tokens, more than seq_length={limit}; "
            "raise it, or leave such pairs out by overlong=drop"
        )
    if options.overlong == "drop":
        tally.dropped.add(OVERLONG, pair.line)
        return None
    cut_prompt = options.overlong == "truncate_prompt"
    cut = _cut_prompt(triple, limit) if cut_prompt else _cut_responses(triple, limit)
    if cut is None:
        tally.dropped.add(STILL_OVERLONG, pair.line)
        return None
    tally.changed.add(CUT_PROMPT if cut_prompt else CUT_RESPONSE, pair.line)
    return cut


def _cut_prompt(triple: TokenTriple, limit: int) -> TokenTriple | None:
    """Keep the prompt's end, the same for both responses; None if the longer response leaves no room for it."""
    room = limit - max(len(triple.chosen), len(triple.rejected))
    return triple._replace(prompt=triple.prompt[-room:]) if room > 0 else None


def _cut_responses(triple: TokenTriple, limit: int) -> TokenTriple | None:
    """Keep the responses' beginnings, without eos; None if the prompt leaves no room or they no longer differ."""
    room = limit - len(triple.prompt)
    chosen, rejected = triple.chosen[: max(room, 0)], triple.rejected[: max(room, 0)]
    return None if chosen == rejected else TokenTriple(triple.prompt, chosen, rejected)
