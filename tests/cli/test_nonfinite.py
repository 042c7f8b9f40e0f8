"""A step whose loss or gradient is not finite: it names its pairs, no rank updates, and the run stops or goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.training.nonfinite import FILE
from tests.cli.conftest import TRAIN_PAIRS, Inputs
from tests.cli.faults import POISONED, STOP_AFTER
from tests.cli.launch_support import error_line
from tests.cli.probes import read_facts
from tests.support.cli import Run, run_cli

SKIP = "trainer.dpo.on_nonfinite=skip"
POISON, POISON_ALL, WATCH = (
    f"tests.cli.faults:{name}" for name in ("poison_a_pair", "poison_all_pairs", "watch_weights")
)
STEPS, PER_EPOCH = 8, 4
TWO = ["trainer.devices=2"]
LAYOUTS = {
    "1": [],
    "DP 2, bf16": [*TWO, "trainer.precision=bf16"],
    "TP 2": [*TWO, "model.tensor_model_parallel_size=2"],
    "PP 2": [*TWO, "model.pipeline_model_parallel_size=2"],
}
# From the first step on each update moves weights, so that equal digests mean that there was none.
MOVING = ["model.optim.sched.warmup_steps=0", "model.optim.lr=0.001", "model.optim.sched.min_lr=0.0001"]
MOVING += ["model.optim.sched.constant_steps=0"]


def reports(log_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log_dir / FILE).read_text().splitlines()]


def named(report: dict[str, Any]) -> list[tuple[int, list[str]]]:
    return [(pair["index"], pair["nonfinite"]) for pair in report["pairs"] if pair["nonfinite"]]


def figures(run: Run) -> str:
    """All rows but what a clock or the system measures; as text, in which NaN equals NaN."""
    measured = {"step_time", "validation_step_time", "pairs_per_second", "tokens_per_second", "memory_gib"}
    rows = [*run.rows("train"), *run.rows("val")]
    return json.dumps([{name: value for name, value in row.items() if name not in measured} for row in rows])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skipped_on_all_ranks_and_counted(inputs: Inputs, tmp_path: Path, layout: str) -> None:
    arguments = [*inputs.arguments(), SKIP, *MOVING, *LAYOUTS[layout]]
    run = run_cli(arguments, tmp_path, patches=[POISON, WATCH])
    found = reports(tmp_path)
    steps = [report["step"] for report in found]
    assert len(steps) == 2, "the pair comes once an epoch"
    assert steps[0] < PER_EPOCH <= steps[1] < STEPS
    for report in found:
        assert named(report) == [(POISONED, ["policy chosen"])]
        (poisoned,) = (pair for pair in report["pairs"] if pair["nonfinite"])
        assert (poisoned["file"], poisoned["line"]) == (str(inputs.train), POISONED + 1)
        assert len(report["pairs"]) == (TRAIN_PAIRS % 8 if report["step"] % PER_EPOCH == PER_EPOCH - 1 else 8)
        assert (report["loss"], report["action"]) == ("nan", "skip")
    assert run.output.count(f"{inputs.train}:{POISONED + 1}; all its pairs are in {tmp_path / FILE}") == 2, run.output

    assert [row["skipped_steps"] for row in run.rows("train")] == [
        sum(step <= k for step in steps) for k in range(STEPS)
    ]
    for digests in read_facts(tmp_path):
        still = [k for k in range(1, STEPS) if digests[k] == digests[k - 1]]
        assert still == [step for step in steps if step]
    finite = [row["step"] for row in run.rows("train") if math.isfinite(row["loss"])]
    assert finite == [k for k in range(STEPS) if k not in steps]


def test_the_schedule_moves_on(inputs: Inputs, tmp_path: Path) -> None:
    arguments = [*inputs.arguments(), SKIP, *MOVING]
    skipping, sound = run_cli(arguments, tmp_path / "skip", patches=[POISON]), run_cli(arguments, tmp_path / "sound")
    for name in ("lr", "consumed_samples", "epoch"):
        assert skipping.series("train", name) == sound.series("train", name)
    assert not (tmp_path / "sound" / FILE).exists()
    assert sound.series("train", "skipped_steps") == [0] * STEPS


def test_resumed_is_uninterrupted(inputs: Inputs, tmp_path: Path) -> None:
    """Stopped after the steps before the count: it goes on from the checkpoint, not from 0."""
    saving = "exp_manager.create_checkpoint_callback=true"
    arguments = [*inputs.arguments(), SKIP, *MOVING, *TWO, saving, "model.hidden_dropout=0.1"]
    whole = run_cli(arguments, tmp_path / "whole", patches=[POISON])
    run_cli(arguments, tmp_path / "halves", patches=[POISON, "tests.cli.faults:stop_early"])
    skipped = [report["step"] for report in reports(tmp_path / "halves")]
    progress = json.loads((tmp_path / "halves/checkpoints/last/progress.json").read_text())
    assert (progress["step"], progress["skipped_steps"]) == (STOP_AFTER, len(skipped)) == (STOP_AFTER, 1)
    resumed = run_cli(arguments, tmp_path / "halves", patches=[POISON])
    assert figures(resumed) == figures(whole)
    assert [report["step"] for report in reports(tmp_path / "halves")] == [
        report["step"] for report in reports(tmp_path / "whole")
    ]


def test_too_many_in_a_row_stop_the_run(inputs: Inputs, tmp_path: Path) -> None:
    """A sound step before them does not count; nor does a restart begin to count anew."""
    saving = ["exp_manager.create_checkpoint_callback=true", "trainer.dpo.save_interval=1"]
    arguments = [*inputs.arguments(), SKIP, "trainer.dpo.max_consecutive_skips=2", *saving, *TWO]
    first = run_cli(arguments, tmp_path, check=False, patches=[POISON_ALL])
    again = run_cli(arguments, tmp_path, check=False, patches=[POISON_ALL])
    assert (first.status, again.status) == (1, 1)
    message = error_line(first.output)
    for part in ("step 2: the loss is nan", "3 such steps in a row; trainer.dpo.max_consecutive_skips=2", "lower"):
        assert part in message
    assert [(report["step"], report["action"]) for report in reports(tmp_path)] == [
        (0, "skip"),
        (1, "skip"),
        (2, "stop"),
        (2, "stop"),  # of the second start, which resumed from step 2 with two skips behind it
    ]
    assert [row["step"] for row in again.rows("train")] == [0, 1]


@pytest.mark.parametrize("layout", ["1", "PP 2"])
def test_stopping_is_the_default(inputs: Inputs, tmp_path: Path, layout: str) -> None:
    run = run_cli([*inputs.arguments(), *LAYOUTS[layout]], tmp_path, check=False, patches=[POISON])
    assert run.status == 1, run.output
    (report,) = reports(tmp_path)
    assert report["action"] == "stop"
    assert named(report) == [(POISONED, ["policy chosen"])]
    message = run.output.partition("error: ")[2]  # rank 1's may follow the progress bar on its line
    assert f"step {report['step']}: the loss is nan; no parameter was changed" in message
    assert f"{inputs.train}:{POISONED + 1}; all its pairs are in {tmp_path / FILE}" in message
    assert [row["step"] for row in run.rows("train")] == list(range(report["step"]))


def test_a_gradient_without_a_culprit_lists_all_pairs(inputs: Inputs, tmp_path: Path) -> None:
    run = run_cli([*inputs.arguments(), SKIP], tmp_path, patches=["tests.cli.broken_host:break_a_gradient"])
    (report,) = reports(tmp_path)
    assert (report["step"], report["grad_norm"], report["action"]) == (1, "inf", "skip")
    assert math.isfinite(float(report["loss"]))
    assert len(report["pairs"]) == 8
    assert named(report) == []
    assert "step 1: gradient norm is inf; no parameter was changed. The log-probs of its pairs are finite" in run.output
