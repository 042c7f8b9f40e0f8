"""The values that the data parts hand to each other: a pair as text, a pair as tokens, the options, the error.

Needs numpy only, so that `DataError` can be caught where torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Overlong = Literal["drop", "truncate_prompt", "truncate_response", "error"]
Invalid = Literal["skip", "error"]
TokenIds = npt.NDArray[np.int32]


class DataError(ValueError):
    """Data that cannot be used; the message names file and line (or key), the value, and what to do."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One line of a data file: texts, ground-truth rewards, and the line it stands on (counted from 1)."""

    prompt: str
    chosen_response: str
    rejected_response: str
    chosen_reward: float
    rejected_reward: float
    line: int


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One tokenised pair, named by its `index` in the split.

    The three arrays are 1-D int32 and never empty; the sequence that the model sees is prompt_ids followed by one of
    the responses. The end-of-text token, where one is asked for, is part of the response.
    """

    index: int
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    chosen_reward: float
    rejected_reward: float

    @property
    def longest(self) -> int:
        """Length in tokens of the longer of the two sequences."""
        return longest_sequence(self.prompt_ids, self.chosen_ids, self.rejected_ids)


def longest_sequence(prompt: Sized, chosen: Sized, rejected: Sized) -> int:
    """Tokens of prompt + response, for the longer response."""
    return len(prompt) + max(len(chosen), len(rejected))


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What decides, besides the file and the tokenizer, which tokens a line becomes. All of it is in the cache's key.

    seq_length: most tokens that prompt + response may have, the end-of-text token included.
    append_eod: end every response with the tokenizer's eos (unless the text ends with it already).
    apply_ftfy: repair mojibake with `ftfy.fix_text` before tokenisation.
    overlong: a pair with a sequence beyond seq_length is dropped; or loses the start of its prompt, which stays the
        same for both responses; or the end of its responses; or is an error. All but the error are counted.
    invalid: a pair without a usable contrast (`nemo_dpo.data.tokenize` lists the reasons) is skipped and counted, or
        is an error.
    default_chosen_reward, default_rejected_reward: for lines that carry no reward.
    """

    seq_length: int
    append_eod: bool = False
    apply_ftfy: bool = False
    overlong: Overlong = "drop"
    invalid: Invalid = "skip"
    default_chosen_reward: float = 1.0
    default_rejected_reward: float = 0.0
