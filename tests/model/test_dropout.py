"""Which ranks share a dropout mask: those that hold the same tensor, and no others; recompute draws it once more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_dpo.parallel.groups import Layout
from tests.model.dropout_cases import RECOMPUTE, gradients_of_rank, states_of_rank
from tests.model.model_cases import SIZES, Case
from tests.support.ranks import run_ranks

LAYERS = 4
TP, SP = Layout(2, tp=2), Layout(2, tp=2, sequence_parallel=True)


NOTHING: set[str] = set()


@pytest.mark.parametrize(
    ("layout", "position", "shared"),
    [
        (TP, None, {"hidden"}),  # heads are shared out, the hidden states are on both
        (SP, None, NOTHING),
        (Layout(2), None, NOTHING),  # other pairs
        (Layout(2, pp=2), None, NOTHING),  # other layers
        # An adapter's input is on both beside a column parallel layer, its output beside a row parallel one.
        (TP, "pre", {"hidden", "column"}),
        (TP, "post", {"hidden", "row"}),
        (SP, "pre", NOTHING),
        (SP, "post", NOTHING),
    ],
    ids=["TP 2", "TP 2 + SP", "DP 2", "PP 2", "TP 2, pre", "TP 2, post", "TP 2 + SP, pre", "TP 2 + SP, post"],
)
def test_masks(cases: dict[str, Case], tmp_path: Path, layout: Layout, position: str | None, shared: set[str]) -> None:
    first, second = run_ranks(2, states_of_rank, tmp_path, cases["gqa_tied"].nemo, layout, position)
    for kind in ("attention", "hidden", *(("column", "row") if position else ())):
        alike = kind in shared
        assert len(first[kind]) >= LAYERS // layout.pp * len(SIZES), kind
        assert len(set(first[kind])) == len(first[kind]), f"{kind}: a mask comes twice"
        if alike:
            assert first[kind] == second[kind], kind
        else:
            assert set(first[kind]).isdisjoint(second[kind]), kind


@pytest.mark.parametrize("position", [None, "pre", "post"], ids=["weights", "adapter, pre", "adapter, post"])
@pytest.mark.parametrize("layout", [TP, SP], ids=["TP 2", "TP 2 + SP"])
def test_recompute_draws_the_masks_of_the_forward_pass(
    cases: dict[str, Case], tmp_path: Path, layout: Layout, position: str | None
) -> None:
    for found in run_ranks(2, gradients_of_rank, tmp_path, cases["gqa_tied"].nemo, layout, position):
        assert found.keys() == RECOMPUTE.keys()
        for kind in ("full", "selective"):
            assert all(map(torch.equal, found["off"], found[kind])), kind
