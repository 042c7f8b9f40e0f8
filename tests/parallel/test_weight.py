"""One weight divides both the gradients and the figures: the one that the objective returns, of whatever size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_dpo.parallel.groups import Layout
from tests.model.model_cases import make_case
from tests.parallel.weight_cases import step_of_rank
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("model")).nemo


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, pp=2)], ids=["DP 2", "PP 2"])
def test_gradients_and_figures_are_divided_by_the_objectives_weight(nemo: Path, tmp_path: Path, layout: Layout) -> None:
    """A pair that weighs 0.125 makes eight of what it makes at 1, exactly: no count of pairs could."""
    for name in ("whole", "eighth"):
        (tmp_path / name).mkdir()
    whole = run_ranks(2, step_of_rank, tmp_path / "whole", nemo, layout, 1.0)
    eighth = run_ranks(2, step_of_rank, tmp_path / "eighth", nemo, layout, 0.125)
    for at_1, at_eighth in zip(whole, eighth, strict=True):
        assert any(gradient.any() for gradient in at_1["gradients"])
        for one, other in zip(at_1["gradients"], at_eighth["gradients"], strict=True):
            assert torch.equal(8 * one, other)
    assert eighth[1]["loss"] == 8 * whole[1]["loss"]
