"""Loading layer by layer: the weights of a load at once, and one layer of them in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_dpo.parallel.groups import Layout
from tests.checkpoint.by_layer_cases import loaded
from tests.model.model_cases import make_case
from tests.support.ranks import run_ranks

LAYOUTS = [Layout(1), Layout(2, tp=2), Layout(2, pp=2)]
LINEARS = 4  # in a layer


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("model")).nemo


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layer_is_right_and_alone(nemo: Path, tmp_path: Path, layout: Layout) -> None:
    for found in run_ranks(layout.world, loaded, tmp_path, nemo, layout):
        layers = found["linears"][0] // LINEARS
        assert layers > 1
        assert found["real"] == [0, *[LINEARS] * layers]
        assert found["equal"] == [True] * (layers + 1)
