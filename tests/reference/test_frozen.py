"""The frozen reference: its own weights inside, the policy's again afterwards, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_dpo.parallel.engine import evaluation, weights_swapped
from nemo_dpo.parallel.groups import Layout
from tests.model.model_cases import make_case
from tests.reference.frozen_cases import train_beside_reference
from tests.support.ranks import run_ranks

LAYOUTS = {"1 process": Layout(1), "TP 2": Layout(2, tp=2)}


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_case(tmp_path_factory.mktemp("model")).nemo


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, nemo: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    layout = LAYOUTS[request.param]
    return run_ranks(layout.world, train_beside_reference, tmp_path_factory.mktemp("ranks"), nemo, layout)


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bitwise."""
    assert len(left) == len(right) == 2
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_reference_is_the_policy_before_the_first_update(ranks: list[dict[str, Any]]) -> None:
    assert all(equal(found["before"], found["policy before"]) for found in ranks)


def test_updates_of_the_policy_do_not_reach_it(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert equal(found["after"], found["before"])
        moved = torch.cat(found["policy after"]) - torch.cat(found["policy before"])
        assert moved.abs().min() > 1e-3


def test_the_policy_is_left_as_it_was(ranks: list[dict[str, Any]]) -> None:
    """Weights, their storage (the optimizer holds on to it), and each module's own mode; dropout was live before."""
    for found in ranks:
        assert found["weights kept"] and found["storages kept"] and found["modes kept"]


def test_no_gradient_leads_to_it(ranks: list[dict[str, Any]]) -> None:
    assert not any(found["needs gradient"] for found in ranks)


class Broken(Exception):
    """Raised inside on purpose."""


def modules() -> list[nn.Module]:
    return [nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout())]


def test_weights_are_swapped_inside_and_back_after_an_exception() -> None:
    chunks = modules()
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    own, storages = [p.detach().clone() for p in parameters], [p.data_ptr() for p in parameters]
    with pytest.raises(Broken), weights_swapped(parameters, [torch.full_like(p, 7.0) for p in parameters]):
        assert all((p == 7.0).all() for p in parameters)
        raise Broken
    assert [p.data_ptr() for p in parameters] == storages
    assert all(torch.equal(p, before) for p, before in zip(parameters, own, strict=True))


def test_modes_come_back_after_an_exception() -> None:
    chunks = modules()
    chunks[1][1].eval()  # type: ignore[index]
    modes = [module.training for chunk in chunks for module in chunk.modules()]
    assert set(modes) == {True, False}
    with pytest.raises(Broken), evaluation(chunks):
        assert not any(module.training for chunk in chunks for module in chunk.modules())
        raise Broken
    assert [module.training for chunk in chunks for module in chunk.modules()] == modes
