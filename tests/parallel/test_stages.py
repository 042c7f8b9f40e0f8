"""Which chunk of which pipeline rank holds the embedding, and which the output layer."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_dpo.parallel.groups import Groups, Layout


@dataclass(frozen=True)
class Place:
    """A process group as seen from one of its ranks."""

    number: int
    of: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.of


def groups(stage: int, stages: int, vpp: int | None) -> Groups:
    collection: Any = SimpleNamespace(pp=Place(stage, stages))
    return Groups(Layout(world=stages, pp=stages, vpp=vpp), torch.device("cpu"), collection)


@pytest.mark.parametrize(("stages", "vpp"), [(1, None), (2, None), (3, None), (2, 2), (3, 2), (2, 3)])
def test_one_place_holds_each_end(stages: int, vpp: int | None) -> None:
    """Chunk c of rank r is number c · stages + r of the model."""
    chunks: list[int | None] = [None] if vpp is None else list(range(vpp))
    places = [(groups(stage, stages, vpp), chunk) for chunk in chunks for stage in range(stages)]
    ends = [(group.is_first_stage(chunk), group.is_last_stage(chunk)) for group, chunk in places]
    expected = [(False, False)] * len(places)
    expected[0] = (True, expected[0][1])
    expected[-1] = (expected[-1][0], True)
    assert ends == expected


def test_a_rank_holds_an_end_in_any_of_its_chunks() -> None:
    assert [groups(stage, 3, 2).is_first_stage() for stage in range(3)] == [True, False, False]
    assert [groups(stage, 3, 2).is_last_stage() for stage in range(3)] == [False, False, True]


@pytest.mark.parametrize(("layout", "dp"), [(Layout(1), 1), (Layout(8, tp=2), 4), (Layout(12, tp=2, pp=3), 2)])
def test_replicas(layout: Layout, dp: int) -> None:
    assert layout.dp == dp
