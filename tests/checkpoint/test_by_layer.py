"""Loading layer by layer: the weights of a load at once, and one layer of them in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.parallel.groups import Layout
from tests.checkpoint.by_layer_cases import loaded
from tests.model.model_cases import make_case
from tests.support.layouts import write_local_names
from tests.support.ranks import run_ranks

LAYOUTS = [Layout(1), Layout(2, tp=2), Layout(2, pp=2)]
LINEARS = 4  # in a layer


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("model")).nemo


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layer_is_right_and_alone(nemo: Path, tmp_path: Path, layout: Layout) -> None:
    check(run_ranks(layout.world, loaded, tmp_path, nemo, layout, nemo / "model_weights"))


def test_norms_by_the_names_of_local_layers(nemo: Path, tmp_path: Path) -> None:
    write_local_names(tmp_path / "local", read_weights(nemo / "model_weights"))
    check(run_ranks(2, loaded, tmp_path, nemo, Layout(2, tp=2), tmp_path / "local"))


def check(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        layers = found["linears"][0] // LINEARS
        assert layers > 1
        assert found["real"] == [0, *[LINEARS] * layers]
        assert found["equal"] == [True] * (layers + 1)
