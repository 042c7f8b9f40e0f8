"""No tensor of [tokens, vocabulary] lives in a training step or in the reference's pass, on one rank or on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.parallel.groups import Layout
from tests.model.model_cases import make_case
from tests.model.shape_probe import CHUNK, sizes_of_rank
from tests.support.ranks import run_ranks

LAYOUTS = {"1 process": Layout(1), "TP 2 + SP": Layout(2, tp=2, sequence_parallel=True)}
PAIRS = 24


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vocabulary is far larger than any of its layers is wide."""
    changes = {"vocab_size": 5000, "intermediate_size": 32}
    return make_case(tmp_path_factory.mktemp("model"), "llama", changes).nemo


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, nemo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    layout, folder = LAYOUTS[request.param], tmp_path_factory.mktemp("sizes")
    return run_ranks(layout.world, sizes_of_rank, folder, nemo, layout, PAIRS)


def test_the_logits_would_be_the_largest_tensor(ranks: list[dict[str, Any]]) -> None:
    """Otherwise the tests below could not fail; and the probe sees logits where they are made."""
    for found in ranks:
        assert found["response_tokens"] * found["rows"] > 2 * found["parameters"]
        assert found["dense"] >= found["response_tokens"] * found["rows"]


def test_nothing_is_larger_than_a_chunk_of_logits_or_the_largest_weight(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        limit = max(found["parameters"], CHUNK * found["rows"])
        assert found["step"] <= limit
        assert found["reference"] <= limit


def test_the_probe_saw_the_backward_pass(ranks: list[dict[str, Any]]) -> None:
    """scatter_add_ is used in the log-probs' backward pass alone."""
    for found in ranks:
        assert any("scatter_add_" in name for name in found["step_operations"])
