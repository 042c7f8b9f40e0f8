"""A model with experts in every layout: transformers' logits, and the gradients of preference and auxiliary loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.parallel.groups import Layout
from tests.model.expert_cases import (
    COEFFICIENT,
    EXPERTS,
    LENGTH,
    MIXTRAL,
    SIZES,
    balance,
    refusal_of_rank,
    step_of_rank,
)
from tests.model.model_cases import Case, make_case, random_batches
from tests.model.test_logits import TOLERANCE, hf_logits
from tests.model.test_training_step import GRADIENT, Expected, by_hugging_face, check_gradients, norm_of
from tests.support.ranks import run_ranks
from tests.support.tiny import SHAPE, VOCABULARY

LAYOUTS = {
    "1 process": Layout(1),
    "TP 2 + SP": Layout(2, tp=2, sequence_parallel=True),
    "PP 2": Layout(2, pp=2),
    "EP 2": Layout(2, ep=2),
    "EP 2 × TP 2 + SP": Layout(4, tp=2, sequence_parallel=True, ep=2),
    "EP 2 × PP 2": Layout(4, pp=2, ep=2),
}
KINDS = ("aux_loss", "seq_aux_loss")
TOKENS = sum(batch.tokens_real for batch in random_batches(SIZES))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("mixtral"), "mixtral", MIXTRAL)


@pytest.fixture(scope="module")
def balances(expected: dict[str, Expected]) -> dict[str, float]:
    """Kind → the auxiliary loss, mean over layers."""
    return {kind: one.more / SHAPE["num_hidden_layers"] / COEFFICIENT for kind, one in expected.items()}


@pytest.fixture(scope="module")
def expected(mixtral: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expected]:
    def more(kind: str, output: Any, batch: Any) -> torch.Tensor:
        return COEFFICIENT / TOKENS * balance(kind, output.router_logits, batch)

    return {
        kind: by_hugging_face(mixtral, tmp_path_factory.mktemp("expected"), SIZES, partial(more, kind))
        for kind in KINDS
    }


@dataclass(frozen=True)
class Found:
    """What the ranks of a layout computed."""

    layout: Layout
    ranks: list[dict[str, dict[str, Any]]]
    gradients: Path


@pytest.fixture(scope="module", params=LAYOUTS)
def found(request: pytest.FixtureRequest, mixtral: Case, tmp_path_factory: pytest.TempPathFactory) -> Found:
    layout, out = LAYOUTS[request.param], tmp_path_factory.mktemp("gradients")
    meeting = tmp_path_factory.mktemp("ranks")
    return Found(layout, run_ranks(layout.world, step_of_rank, meeting, mixtral.nemo, layout, KINDS, out), out)


def test_logits_equal_hugging_faces(found: Found, mixtral: Case) -> None:
    layout = found.layout
    expected = hf_logits(mixtral, LENGTH)
    shards = [rank["aux_loss"]["logits"] for rank in found.ranks if rank["aux_loss"]["logits"] is not None]
    assert len(shards) == layout.world // layout.pp
    for dp in range(layout.dp):
        logits = torch.cat(shards[dp * layout.tp : (dp + 1) * layout.tp], dim=-1)
        size = expected.abs().max()
        assert size > 1 and (logits[..., :VOCABULARY] - expected).abs().max() <= TOLERANCE * size


def test_the_experts_were_shared_out(found: Found) -> None:
    for rank in found.ranks:
        assert rank["aux_loss"]["experts"] == EXPERTS // found.layout.ep
        assert rank["aux_loss"]["fc1"] == [2 * SHAPE["intermediate_size"] // found.layout.tp, SHAPE["hidden_size"]]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(found: Found, expected: dict[str, Expected], kind: str) -> None:
    """Every parameter's, relative to its norm, against autograd of preference loss + coefficient · auxiliary loss."""
    check_gradients(found.gradients / kind, expected[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_norm(found: Found, expected: dict[str, Expected], kind: str) -> None:
    """Each parameter counted once: experts are on few ranks, all else on all."""
    norms = [rank[kind]["grad_norm"] for rank in found.ranks]
    assert norms == pytest.approx([norm_of(expected[kind])] * found.layout.world, rel=GRADIENT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logged_figure(found: Found, balances: dict[str, float], kind: str) -> None:
    """Mean over the tokens and layers, without the coefficient; fp32."""
    figures = [rank[kind]["load_balancing_loss"] for rank in found.ranks]
    assert figures == pytest.approx([balances[kind]] * found.layout.world, rel=1e-5)
    assert abs(balances[kind] - 1) > 0.02, "1 is what experts that are chosen alike would give"


def test_the_auxiliary_loss_matters(expected: dict[str, Expected]) -> None:
    """The two kinds differ, in the router above all: equal gradients would prove nothing of the other tests."""
    router = "model.decoder.layers.mlp.router.weight"
    one, other = (expected[kind].gradients[router] for kind in KINDS)
    assert (one - other).norm() > 0.05 * one.norm()


def test_an_objective_with_weights_of_its_own_is_refused(mixtral: Case, tmp_path: Path) -> None:
    """The auxiliary loss would be divided by them."""
    (said,) = run_ranks(1, refusal_of_rank, tmp_path, mixtral.nemo, Layout(1))
    assert said.startswith("the objective weighs 4 pairs as 8.0; beside the routers' auxiliary loss")
