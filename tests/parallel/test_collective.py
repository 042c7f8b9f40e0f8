"""An action that fails on one rank fails on all, with one error, and leaves the ranks in step: three gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.collective_cases import outcomes, outlast_the_timeout
from tests.support.ranks import run_ranks

WORLD = 3
ERROR = "Fault"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(WORLD, outcomes, tmp_path_factory.mktemp("ranks"), timeout=60)


def test_without_an_error_each_rank_gets_its_own_result(ranks: list[dict[str, Any]]) -> None:
    assert [found["agree, no error"] for found in ranks] == [("returned", f"rank {rank}") for rank in range(WORLD)]


def test_an_error_on_one_rank_raises_on_all(ranks: list[dict[str, Any]]) -> None:
    kinds, texts = zip(*(found["agree, rank 1 fails"] for found in ranks), strict=True)
    assert set(kinds) == {ERROR}
    assert all(text.startswith("rank 1 failed") for text in texts)


@pytest.mark.parametrize(("case", "first"), [("agree, ranks 1 and 2 fail", 1), ("agree, all fail", 0)])
def test_of_several_errors_all_ranks_raise_the_lowest_ranks(ranks: list[dict[str, Any]], case: str, first: int) -> None:
    for found in ranks:
        kind, text = found[case]
        assert kind == ERROR and text.startswith(f"rank {first} failed")
    # A rank's own error is not lost.
    assert ranks[2][case][1] == f"rank {first} failed from rank 2 failed"


def test_rank_zero_acts_alone_and_all_get_its_result(ranks: list[dict[str, Any]]) -> None:
    assert [found["on_rank_zero, no error"] for found in ranks] == [("returned", {"made by": 0})] * WORLD
    assert [found["calls"] for found in ranks] == [[0], [], []]


def test_rank_zeros_error_raises_on_all(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        kind, text = found["on_rank_zero, it fails"]
        assert kind == ERROR and text.startswith("rank 0 failed")


def test_the_ranks_stay_in_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert [value for name, value in found.items() if name.endswith(", then")] == [WORLD] * 6


def test_work_of_rank_zero_may_outlast_the_timeout_of_training(tmp_path: Path) -> None:
    found = run_ranks(2, outlast_the_timeout, tmp_path, tmp_path, timeout=60)
    assert [rank["work of rank 0"] for rank in found] == [("returned", "done")] * 2
    kind, text = found[1]["hung collective"]
    assert kind == "RuntimeError" and "imed out" in text, text
