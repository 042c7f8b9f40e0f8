"""Every layout trains the same model: one process against ranks, micro-batches and recompute, through the command line.

Each case also proves that what it is about was on: equal numbers of a switch that does nothing prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from nemo_dpo.checkpoint import archive
from nemo_dpo.checkpoint.weights import read_weights
from tests.cli.conftest import GLOBAL_BATCH, TRAIN_PAIRS, Inputs
from tests.cli.probes import Facts, read_facts
from tests.support.cli import Run, run_cli
from tests.support.tiny import VOCABULARY, write_pairs

Weights = dict[str, torch.Tensor]

STEPS, LAYERS, QKV_ROWS, HIDDEN = 8, 4, 128, 64
EMBEDDING = "model.embedding.word_embeddings.weight"
REFERENCE = "one process"


@dataclass(frozen=True)
class Case:
    """Command-line arguments, and what they must bring about."""

    arguments: list[str] = field(default_factory=list)
    groups: tuple[int, int, int] = (1, 1, 1)  # tp, pp, dp
    chunks: tuple[int, ...] = (LAYERS,)
    micro_batch: int = 2
    sequence_parallel: bool = False
    layer_forwards: int = 1
    attention_forwards: int = 1

    @property
    def ranks(self) -> int:
        return math.prod(self.groups)


def keys(**values: object) -> list[str]:
    return [f"model.{name}={value}" for name, value in values.items()]


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
RECOMPUTE = "activations_checkpoint_granularity"
CASES = {
    REFERENCE: Case(),
    "TP 2": Case(keys(**{TP: 2}), (2, 1, 1)),
    "TP 2 + SP": Case(keys(**{TP: 2}, sequence_parallel=True), (2, 1, 1), sequence_parallel=True),
    "PP 2": Case(keys(**{PP: 2}), (1, 2, 1), (2,)),
    "PP 2 × VPP 2": Case(keys(**{PP: 2}, virtual_pipeline_model_parallel_size=2), (1, 2, 1), (1, 1)),
    "DP 2": Case(groups=(1, 1, 2)),
    "DP 2 × TP 2": Case(keys(**{TP: 2}), (2, 1, 2)),
    "micro-batch 1": Case(keys(micro_batch_size=1), micro_batch=1),
    "micro-batch 4": Case(keys(micro_batch_size=4), micro_batch=4),
    "recompute full": Case(
        keys(**{RECOMPUTE: "full"}, activations_checkpoint_method="uniform", activations_checkpoint_num_layers=1),
        layer_forwards=2,
        attention_forwards=2,
    ),
    "recompute selective": Case(keys(**{RECOMPUTE: "selective"}), attention_forwards=2),
}
# warmup_steps=0: with warm-up the first step has learning rate 0 and compares nothing.
SCHEDULE = keys(**{"optim.sched.warmup_steps": 0, "optim.sched.constant_steps": 0, "optim.sched.min_lr": 0.0001})
# Adam divides by √v + ε. Where a gradient is as small as its rounding error the quotient is noise of size lr, in
# whatever layout; ε = 1e-4, about 1e-3 of a typical √v here, keeps such entries out of the comparison.
ADAM = keys(**{"optim.lr": 0.001, "optim.eps": 0.0001})
# Gradients are clipped (their norm is about 7, the limit 1) under Adam. SGD goes unclipped: an update that is
# proportional to the gradient also shows a wrong scale of it.
OPTIMIZERS = {
    "sgd": [
        *keys(**{"optim.name": "sgd", "optim.lr": 0.001, "optim.momentum": 0.9}),
        "trainer.dpo.gradient_clip_val=0",
    ],
    "adam": [*ADAM, "model.optim.name=adam"],
    "mcore_distributed_optim": [*ADAM, "model.optim.name=mcore_distributed_optim"],
}
# Micro-batches and recompute do not touch the optimizer: plain Adam is run on ranks only.
RUNS = [
    (optimizer, name)
    for optimizer in OPTIMIZERS
    for name, case in CASES.items()
    if optimizer != "adam" or case.ranks > 1 or name == REFERENCE
]


@dataclass(frozen=True)
class Trained:
    """A run's per-step figures, weights and facts."""

    run: Run
    weights: Weights
    facts: list[Facts]


Train = Callable[[str, str], Trained]


@pytest.fixture(scope="module")
def train(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """(optimizer, case) → the run, made once."""
    return cache(lambda optimizer, name: _train(inputs, tmp_path_factory.mktemp("run"), optimizer, CASES[name]))


def _train(inputs: Inputs, log_dir: Path, optimizer: str, case: Case) -> Trained:
    arguments = [
        *inputs.arguments(),
        *SCHEDULE,
        *OPTIMIZERS[optimizer],
        *case.arguments,
        f"trainer.devices={case.ranks}",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
    ]
    run = run_cli(arguments, log_dir, patches=["tests.cli.probes:watch"])
    return Trained(run, weights_of(log_dir / "checkpoints" / "megatron_gpt.nemo"), read_facts(log_dir))


def weights_of(nemo: Path) -> Weights:
    """All parameters of an archive; of the embedding the real rows, as their padding depends on TP."""
    with archive.open_folder(nemo) as folder:
        weights = dict(read_weights(folder / archive.MODEL_WEIGHTS))
    weights[EMBEDDING] = weights[EMBEDDING][:VOCABULARY]
    return weights


def relative_error(found: Weights, expected: Weights) -> float:
    """‖found − expected‖ / ‖expected‖ over all parameters, in float64."""
    assert found.keys() == expected.keys()
    difference = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    return math.sqrt(difference / sum(value.double().square().sum() for value in expected.values()))


def update(trained: Trained, start: Weights) -> Weights:
    return {name: trained.weights[name].double() - value.double() for name, value in start.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_reference_run_learns(train: Train, optimizer: str) -> None:
    losses = train(optimizer, REFERENCE).run.series("train", "loss")
    assert len(losses) == STEPS
    assert sum(abs(loss - math.log(2)) >= 0.05 for loss in losses) >= 4


@pytest.mark.parametrize(("optimizer", "name"), [run for run in RUNS if run[1] != REFERENCE])
def test_same_training_in_every_layout(train: Train, inputs: Inputs, optimizer: str, name: str) -> None:
    expected, found, start = train(optimizer, REFERENCE), train(optimizer, name), weights_of(inputs.nemo)
    for metric in ("loss", "grad_norm"):
        reference = expected.run.series("train", metric)
        assert found.run.series("train", metric) == pytest.approx(reference, rel=1e-5), metric
    assert found.run.series("val", "loss") == pytest.approx(expected.run.series("val", "loss"), rel=1e-5)
    assert relative_error(update(found, start), update(expected, start)) <= 1e-4


@pytest.mark.parametrize(("optimizer", "name"), RUNS)
def test_what_the_case_is_about_was_on(train: Train, optimizer: str, name: str) -> None:
    case, ranks = CASES[name], train(optimizer, name).facts
    tp, pp, dp = case.groups
    assert len(ranks) == case.ranks
    for facts in ranks:
        assert facts["groups"] == list(case.groups)
        assert facts["chunks"] == list(case.chunks)
        assert facts["qkv"] == [QKV_ROWS // tp, HIDDEN]
        assert all(shown == tokens // (tp if case.sequence_parallel else 1) for tokens, shown in facts["lengths"])
        forwards = sum(len(step) for step in facts["steps"]) * sum(case.chunks)
        assert facts["calls"]["layer"] == case.layer_forwards * forwards
        assert facts["calls"]["attention"] == case.attention_forwards * forwards
        if optimizer != "sgd":
            shares = dp if optimizer == "mcore_distributed_optim" else 1
            # The distributed optimizer pads its buffer before it cuts it.
            assert facts["optimizer_values"] == pytest.approx(facts["parameters"] / shares, rel=0.05)
    full = [case.micro_batch] * (GLOBAL_BATCH // dp // case.micro_batch)
    for number in range(STEPS):
        shares_of_step = [facts["steps"][number] for facts in ranks]
        if number % 4 < 3:
            assert shares_of_step == [full] * case.ranks
        else:  # the last batch of an epoch: three pairs, so some micro-batch is empty or half full
            assert sum(sum(share) for share in shares_of_step) == TRAIN_PAIRS % GLOBAL_BATCH * tp * pp


@pytest.fixture(scope="module")
def of_nine(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Case → a run with SGD over two epochs of nine pairs, in batches of 8 and 1."""
    pairs = write_pairs(tmp_path_factory.mktemp("nine") / "train.jsonl", GLOBAL_BATCH + 1, seed=2)
    own = replace(inputs, train=pairs)
    return lambda name: _train(own, tmp_path_factory.mktemp("run"), "sgd", CASES[name])


@pytest.fixture(scope="module")
def reference_of_nine(of_nine: Callable[[str], Trained]) -> Trained:
    return of_nine(REFERENCE)


@pytest.mark.parametrize("name", ["DP 2", "DP 2 × TP 2", "PP 2 × VPP 2"])
def test_a_last_batch_of_one_pair(
    of_nine: Callable[[str], Trained], reference_of_nine: Trained, inputs: Inputs, name: str
) -> None:
    """All data-parallel ranks but one, or all micro-batches but one, have no pair."""
    found, start = of_nine(name), weights_of(inputs.nemo)
    for metric in ("loss", "grad_norm"):
        expected = reference_of_nine.run.series("train", metric)
        assert len(expected) == 4
        assert found.run.series("train", metric) == pytest.approx(expected, rel=1e-5), metric
    assert relative_error(update(found, start), update(reference_of_nine, start)) <= 1e-4
    shares = [facts["steps"][step] for facts in found.facts for step in (1, 3)]
    assert {tuple(share) for share in shares} == ({(0,), (1,)} if "DP" in name else {(1, 0)})
