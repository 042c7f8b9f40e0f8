"""Adapters are switched for a while and back, whatever happens meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lora.switch_cases import switched
from tests.model.model_cases import make_case
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    nemo = make_case(tmp_path_factory.mktemp("model")).nemo
    return run_ranks(1, switched, tmp_path_factory.mktemp("ranks"), nemo)[0]


def test_off_inside_and_on_again_after_an_exception(found: dict[str, Any]) -> None:
    assert found["inside"] == {None}
    assert found["after"] == {"policy"}


def test_a_reference_pass_that_fails_leaves_the_adapter_on(found: dict[str, Any]) -> None:
    assert found["after reference"] == {"policy"}
    assert found["training"] == {True}
