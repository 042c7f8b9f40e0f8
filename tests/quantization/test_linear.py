"""Quantized parallel layers: the numbers of a plain layer with the unpacked weight, and none of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.parallel.groups import Layout
from tests.quantization.linear_cases import (
    INPUTS,
    OUTPUTS,
    quantized_and_plain,
    refusals,
    unpacked_while,
    whole_model,
)
from tests.support.ranks import run_ranks

pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the extra `qlora`, is missing")

LAYOUTS = {
    "1 process": Layout(1),
    "TP 2": Layout(2, tp=2),
    "TP 2 + SP": Layout(2, tp=2, sequence_parallel=True),
}
KINDS = ["column", "row"]


@pytest.fixture(
    scope="module",
    params=[(name, dtype) for name in LAYOUTS for dtype in (torch.float32, torch.bfloat16)],
    ids=lambda case: f"{case[0]}, {case[1]}",
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    name, dtype = request.param
    layout = LAYOUTS[name]
    return run_ranks(layout.world, quantized_and_plain, tmp_path_factory.mktemp("ranks"), layout, dtype)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return all(torch.equal(left[name], right[name]) for name in ("output", "gradient"))


@pytest.mark.parametrize("kind", KINDS)
def test_same_as_a_plain_layer_with_the_unpacked_weight(ranks: list[dict[str, Any]], kind: str) -> None:
    for found in ranks:
        assert same(found[f"{kind}, quantized"], found[f"{kind}, plain"])
        assert not same(found[f"{kind}, quantized"], found[f"{kind}, before"])


@pytest.mark.parametrize("kind", KINDS)
def test_same_where_activations_are_recomputed(ranks: list[dict[str, Any]], kind: str) -> None:
    assert all(same(found[f"{kind}, recomputed"], found[f"{kind}, quantized"]) for found in ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_before_it_is_quantized(ranks: list[dict[str, Any]], kind: str) -> None:
    assert all(same(found[f"{kind}, before"], found[f"{kind}, plain before"]) for found in ranks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_unpacked_weight_outlives_a_pass(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    for found in run_ranks(layout.world, unpacked_while, tmp_path, layout):
        for kind in KINDS:
            assert found[f"{kind}, after forward"] == [1, 0]
            assert found[f"{kind}, after backward"] == [2, 0]


def test_refusals(tmp_path: Path) -> None:
    found = run_ranks(1, refusals, tmp_path)[0]
    layer = f"QuantizedColumn(in_features={INPUTS}, out_features={OUTPUTS}, bias=False, TP=1)"
    assert found["again"] == f"ValueError: {layer} is quantized already"
    unsaved = f"ValueError: the weight of {layer} is quantized and cannot be saved: "
    assert found["state_dict"].startswith(unsaved)
    assert found["sharded_state_dict"].startswith(unsaved)
    assert found["nothing to quantize"].startswith("ConfigError: no layer of this model can be quantized")


def test_memory_of_a_model(tmp_path: Path) -> None:
    found = run_ranks(1, whole_model, tmp_path)[0]
    assert found["parameters"] == 2 * INPUTS * OUTPUTS
    assert found["bytes"] == found["buffers"] <= 0.6 * found["parameters"]
    assert found["weights"] == [(0, False)] * 2
    assert found["others"] == [20, 20]
    assert found["names"] == ["0.bias", "0.weight", "1.bias", "1.weight"]
