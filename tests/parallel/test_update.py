"""`Engine.update`: clipping, gradients that are no numbers; and the optimizer's keys."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint.archive import MODEL_WEIGHTS
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.config.schema import OptimConfig
from tests.model.model_cases import make_case
from tests.parallel.update_cases import clipped_updates, decayed, masters_at_start, unwanted_update, update_on_nan
from tests.support.ranks import run_ranks

LEARNING_RATE = 0.1  # of the SGD that tests.model.model_cases.build gives


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("model")).nemo


def test_clipping(nemo: Path, tmp_path: Path) -> None:
    """SGD: the update is −lr · gradient, scaled to the limit only where the norm is above it."""
    limits = [0.0, 0.5, 1e6]
    found = run_ranks(1, clipped_updates, tmp_path, nemo, limits)[0]
    norm = float(found["gradient"].double().norm())
    assert norm > 1
    assert found["norms"] == pytest.approx([norm] * 3, rel=1e-5)
    step = -LEARNING_RATE * found["gradient"].double()
    for update, scale in zip(found["updates"], (1, 0.5 / norm, 1), strict=True):
        # Weights of about 1 round an update at 6e-8 each; the least update has a norm of 0.05.
        assert (update - scale * step).norm() <= 1e-3 * (scale * step).norm()


def test_a_gradient_that_is_no_number_changes_nothing(nemo: Path, tmp_path: Path) -> None:
    norm, unchanged = run_ranks(1, update_on_nan, tmp_path, nemo)[0]
    assert math.isnan(norm)
    assert unchanged


def test_an_update_that_is_not_wanted_changes_nothing(nemo: Path, tmp_path: Path) -> None:
    norm, unchanged = run_ranks(1, unwanted_update, tmp_path, nemo)[0]
    assert 0 < norm < math.inf
    assert unchanged


@pytest.mark.parametrize(
    ("name", "optimizer", "distributed"),
    [("sgd", "sgd", False), ("adam", "adam", False), ("mcore_distributed_optim", "adam", True)],
)
def test_every_key_of_the_optimizer_arrives(name: str, optimizer: str, distributed: bool) -> None:
    from nemo_dpo.parallel.engine import optimizer_config

    keys = OptimConfig(name=name, lr=0.25, weight_decay=0.5, betas=[0.75, 0.875], eps=0.125, momentum=0.625)
    model: Any = SimpleNamespace(bf16=True, params_dtype=torch.bfloat16)
    made = optimizer_config(keys, model)
    assert (made.optimizer, made.use_distributed_optimizer) == (optimizer, distributed)
    assert (made.lr, made.weight_decay, made.adam_beta1, made.adam_beta2) == (0.25, 0.5, 0.75, 0.875)
    assert (made.adam_eps, made.sgd_momentum) == (0.125, 0.625)
    assert (made.bf16, made.params_dtype, made.clip_grad) == (True, torch.bfloat16, 0.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "mcore_distributed_optim"])
def test_norms_and_biases_are_not_decayed(nemo: Path, tmp_path: Path, optimizer: str) -> None:
    left = run_ranks(1, decayed, tmp_path, nemo, optimizer)[0]
    kept = {name for name, share in left.items() if share == pytest.approx(1, rel=1e-6)}
    assert kept == {name for name in left if "norm" in name or name.endswith("bias")} != set()
    assert [left[name] for name in left.keys() - kept] == pytest.approx([1 - 0.5 * 0.25] * (len(left) - len(kept)))


@pytest.mark.parametrize(
    ("world", "optimizer"), [(1, "adam"), (1, "mcore_distributed_optim"), (2, "mcore_distributed_optim")]
)
def test_masters_are_the_checkpoints_weights_and_not_rounded_ones(
    world: int, optimizer: str, nemo: Path, tmp_path: Path
) -> None:
    ranks = run_ranks(world, masters_at_start, tmp_path, nemo, world, optimizer)
    stored = read_weights(nemo / MODEL_WEIGHTS)
    exact = torch.cat([stored[name].flatten() for name in stored]).sort().values
    assert torch.equal(torch.cat([found["masters"] for found in ranks]).sort().values, exact)
    for found in ranks:
        assert torch.equal(found["parameters"], exact.bfloat16().sort().values)
    assert not torch.equal(exact, exact.bfloat16().float())
