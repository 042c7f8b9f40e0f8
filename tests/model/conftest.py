"""The tiny models, and what one process and real ranks compute with them; made once for all tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.parallel.groups import Layout
from tests.model.model_cases import CASES, Case, findings_of_rank, make_case
from tests.support.ranks import run_ranks

LAYOUTS = {
    "1 process": Layout(1),
    "TP 2": Layout(2, tp=2),
    "TP 2 + SP": Layout(2, tp=2, sequence_parallel=True),
    "PP 2": Layout(2, pp=2),
}


@dataclass(frozen=True)
class Findings:
    """What the ranks of a layout computed."""

    layout: Layout
    ranks: list[dict[str, dict[str, Any]]]
    gradients: Path  # folder with the gradients of each case, as weights

    def each(self, case: str, what: str) -> list[Any]:
        """By rank; ranks without it are left out."""
        return [found[case][what] for found in self.ranks if found[case][what] not in (None, [])]


class Cases(dict[str, Case]):
    """Models of CASES, each made when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory

    def __missing__(self, name: str) -> Case:
        self[name] = make_case(self._factory.mktemp(name), *CASES[name])
        return self[name]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every model of CASES."""
    return Cases(tmp_path_factory)


@pytest.fixture(scope="session")
def names(request: pytest.FixtureRequest) -> list[str]:
    """Of the models that the tests of this session are about: one test alone does not wait for the others' models."""
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    return [name for name in CASES if name in wanted]


@pytest.fixture(scope="session")
def lengths() -> dict[str, int]:
    """Tokens in the rows that logits are computed of."""
    return dict.fromkeys(CASES, 24) | {"llama3_rope": 400}


@pytest.fixture(scope="session", params=LAYOUTS)
def findings(
    request: pytest.FixtureRequest,
    cases: dict[str, Case],
    names: list[str],
    lengths: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Findings:
    """One layout's."""
    layout, out = LAYOUTS[request.param], tmp_path_factory.mktemp("gradients")
    folders = {name: cases[name].nemo for name in names}
    meeting = tmp_path_factory.mktemp("ranks")
    return Findings(layout, run_ranks(layout.world, findings_of_rank, meeting, folders, layout, lengths, out), out)
