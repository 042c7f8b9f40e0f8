"""Whether two tokenizers are the same: ids of texts, of special tokens, and what chats are made of."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from nemo_dpo.tokenizer.hf_files import TokenizerError
from nemo_dpo.tokenizer.load import Tokenizer

logger = logging.getLogger(__name__)

# Texts that tell tokenizers apart: scripts, digits, code, white space at either end and inside.
PROBE = (
    "The fox's 3.14159, naïve café; Straße ﬁ ½",
    "Ελληνικά, кириллица, 東京タワー, العربية, हिन्दी नमस्ते, 한국어, 🙂👩‍👩‍👧",
    "def add(a, b):\n    return a**2 + b[1889]  # 2 + 2 == 4\n\n\n\t1. x\r\n",
    "  two before, three   inside, one behind ",
    "\n\n1. first\n",
    "12345 6 78",
)


def differences(first: Tokenizer, second: Tokenizer, texts: Sequence[str] = PROBE) -> list[str]:
    """What two tokenizers do not have in common, in words; nothing if they are the same.

    Compared are the number of tokens, the ids of the tokens for beginning, end, padding and the unknown, of every added
    or special token, of `texts`, of each of those tokens between two letters, and the chat templates.
    """
    return [*_differences(first, second, texts), *_spelled(first, second, first.added_tokens | second.added_tokens)]


def check_same_tokenizer(original: Tokenizer, written: Tokenizer, label: str) -> None:
    """Refuse a tokenizer that was just written and is not the one it was made of, which `label` names.

    Symbols that SentencePiece's user defined are more to it than Hugging Face has a counterpart for: it takes the text
    around them for one, not two. Where that makes other ids, a warning says so.

    Raises:
        TokenizerError: it differs.
    """
    if found := list(_differences(original, written, PROBE)):
        raise TokenizerError(f"{label}: the tokenizer that was written of it is not the same: {'; '.join(found)}")
    for line in _spelled(original, written, original.added_tokens | written.added_tokens):
        logger.warning("%s: the tokenizer that was written of it makes %s", label, line)


def _differences(first: Tokenizer, second: Tokenizer, texts: Sequence[str]) -> Iterator[str]:
    if first.vocab_size != second.vocab_size:
        yield f"{first.vocab_size} and {second.vocab_size} tokens"
    for role in sorted(first.roles.keys() | second.roles.keys()):
        if first.roles.get(role) != second.roles.get(role):
            yield f"the token {role} is {first.roles.get(role)} and {second.roles.get(role)}"
    every = first.special_tokens | second.special_tokens | first.added_tokens | second.added_tokens
    moved = [token for token in sorted(every) if first.token_id(token) != second.token_id(token)]
    if moved:
        ids = first.token_id(moved[0]), second.token_id(moved[0])
        yield f"other ids for {len(moved)} special tokens, {moved[0]!r} ({ids[0]} and {ids[1]}) among them"
    yield from _other_ids(first, second, texts)
    yield from _spelled(first, second, first.special_tokens & second.special_tokens)
    if first.chat_template != second.chat_template:
        yield "other chat templates"


def _spelled(first: Tokenizer, second: Tokenizer, tokens: AbstractSet[str]) -> Iterator[str]:
    """How they differ where a token is written out in a text."""
    return _other_ids(first, second, [f"a{token}b" for token in sorted(tokens)])


def _other_ids(first: Tokenizer, second: Tokenizer, texts: Sequence[str]) -> Iterator[str]:
    pairs = zip(texts, first.encode_batch(list(texts)), second.encode_batch(list(texts)), strict=True)
    wrong = [text for text, mine, theirs in pairs if mine != theirs]
    if wrong:
        yield f"other ids for {len(wrong)} of {len(texts)} texts, {wrong[0]!r} among them"
