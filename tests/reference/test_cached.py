"""Looking up cached log-probs: by the pair's index, whatever the batch looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.data.batch import GlobalBatch, MicroBatch, collate
from nemo_dpo.data.types import TokenPair
from nemo_dpo.parallel.groups import Groups
from nemo_dpo.reference.cached import CachedReference
from nemo_dpo.reference.table import ROW, Rows


@dataclass(frozen=True)
class Stage:
    """A place in a pipeline."""

    last: bool = True

    def is_last_stage(self) -> bool:
        return self.last


def pair(index: int) -> TokenPair:
    """Pair i has a chosen response of i + 1 tokens and a rejected one of 2 i + 3."""
    ids = [np.arange(length, dtype=np.int32) for length in (2, index + 1, 2 * index + 3)]
    return TokenPair(index, *ids, 1.0, 0.0)


def table(sign: float) -> Rows:
    """Row i: log-probs −i and −i − ½, or with the other sign, and the token numbers of `pair(i)`."""
    rows = np.empty(6, ROW)
    rows["logps"] = [(-sign * i, -sign * (i + 0.5)) for i in range(6)]
    rows["tokens"] = [(i + 1, 2 * i + 3) for i in range(6)]
    return rows


TABLES = {"train": table(1.0), "validation": table(-1.0)}


def reference(last: bool = True) -> CachedReference:
    return CachedReference(TABLES, cast(Groups, Stage(last)))


def batch(*indices: int) -> MicroBatch:
    return collate([pair(index) for index in indices], pad_id=0)


def test_rows_follow_the_index_of_the_pair() -> None:
    shuffled = GlobalBatch((batch(4, 0), batch(3), batch()), "train")
    first, second, none = reference().logps(shuffled)
    assert first.tolist() == [-4.0, -4.5, 0.0, -0.5]  # chosen, rejected; chosen, rejected
    assert second.tolist() == [-3.0, -3.5]
    assert none.shape == (0,)
    assert {part.dtype for part in (first, second, none)} == {torch.float32}


def test_each_split_has_its_own_rows() -> None:
    (validation,) = reference().logps(GlobalBatch((batch(4),), "validation"))
    assert validation.tolist() == [4.0, 4.5]


def test_places_of_responses_are_taken_from_pair_segments() -> None:
    """The rejected response may be numbered before the chosen one, as another layout may do."""
    usual = batch(4, 1)
    exchanged = replace(
        usual,
        pair_segments=usual.pair_segments.flip(1),
        response_segment=usual.response_segment ^ 1,
    )
    (logps,) = reference().logps(GlobalBatch((exchanged,), "train"))
    assert logps.tolist() == [-4.5, -4.0, -1.5, -1.0]


def test_only_the_last_stage_gets_them() -> None:
    assert reference(last=False).logps(GlobalBatch((batch(1),), "train")) == []


@pytest.mark.parametrize("wrong", [np.roll(table(1.0), 1), np.roll(table(1.0), -1), np.zeros(6, ROW)])
def test_rows_of_other_responses_are_noticed(wrong: Rows) -> None:
    shifted = CachedReference({"train": wrong}, cast(Groups, Stage()))
    with pytest.raises(CheckpointError, match="log-probs of train are not in the order of its pairs"):
        shifted.logps(GlobalBatch((batch(2, 3),), "train"))
