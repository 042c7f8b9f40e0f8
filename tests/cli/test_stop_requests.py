"""A request to stop at any moment: what is saved, what the batch script finds, and how the process ends.

tests/cluster has the same with Slurm's own signals.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.conftest import Inputs
from tests.cli.launch_support import SCRIPT, ended, start
from tests.cli.test_resume import figures, saved_steps
from tests.support.cli import Run, run_cli
from tests.support.offline_wandb import wandb_steps

PROBES = "tests.cli.stop_probes"
OPTIONS = [
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
    "trainer.dpo.max_steps=3",
    "trainer.dpo.val_check_interval=1",
    "model.global_batch_size=4",  # of the 7 validation pairs there are two
]
NOTHING = "step 0, 0 reference log-probs"


def stopped(inputs: Inputs, log_dir: Path, *probes: str, options: Sequence[str] = ()) -> Run:
    """A run under these probes, in a folder of data of its own."""
    arguments = [*inputs.arguments(), *OPTIONS, *options, f"model.data.cache_dir={log_dir / 'data'}"]
    return run_cli(arguments, log_dir, check=False, patches=[f"{PROBES}:{probe}" for probe in probes])


def asked_for(run: Run) -> str | None:
    """What the batch script finds."""
    path = run.log_dir / "requeue"
    return path.read_text().strip() if path.exists() else None


@pytest.mark.parametrize(
    ("moment", "where", "step"),
    [
        ("while_tokenising", "while the data were prepared", None),
        ("while_building", "before the first step of this start", None),
        ("in_the_first_validation", "after step 0 of 3", None),
        ("in_the_first_step", "after step 1 of 3", 1),
        ("while_validating", "after step 1 of 3", 1),
        ("in_the_last_validation", "after step 3 of 3", 3),
    ],
)
def test_what_is_to_be_requeued_leaves_a_file(
    inputs: Inputs, whole: Run, tmp_path: Path, moment: str, where: str, step: int | None
) -> None:
    run = stopped(inputs, tmp_path, "can_be_requeued", moment)
    assert run.status == 0, run.output
    assert f"ended {where} (SIGUSR1); start again to resume" in run.output
    assert asked_for(run) == (f"step {step}, 0 reference log-probs" if step else NOTHING)
    if step:
        assert saved_steps(tmp_path) == [step]
    assert not list((tmp_path / "data").glob("*.tmp-*")), "half a file of tokens"
    again = stopped(inputs, tmp_path, "never_asked")
    assert figures(again) == figures(whole)


LAYOUTS = {
    "1": [],
    "1, async": ["exp_manager.checkpoint_callback_params.async_save=true"],
    "DP 2": ["trainer.devices=2"],
    "PP 2": ["trainer.devices=2", "model.pipeline_model_parallel_size=2"],
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stop_in_a_validation_does_not_wait_for_its_end(inputs: Inputs, tmp_path: Path, layout: str) -> None:
    """It is the next start's, whatever becomes of those between; one rank has been asked, and all stop."""

    def run(*probes: str, log_dir: Path = tmp_path / "stopped") -> Run:
        return stopped(inputs, log_dir, "can_be_requeued", *probes, options=LAYOUTS[layout])

    first = run("while_validating")
    assert "ended after step 1 of 3 (SIGUSR1)" in first.output
    assert [row["step"] for row in first.rows("val")] == [0]
    (only,) = (first.log_dir / "checkpoints").glob("megatron_gpt--*")
    assert "val_loss=nan-step=1" in only.name, "not the figure of other weights"

    both = run("in_the_first_validation").output  # a folder's runs write to one file
    assert both.count("ended after step 1 of 3 (SIGUSR1)") == 2
    assert both.count("saved megatron_gpt--") == 1, "nothing was new"
    run("killed_in_the_first_step")
    assert [row["step"] for row in first.rows("val")] == [0, 1]

    last, whole = run("never_asked"), run("never_asked", log_dir=tmp_path / "whole")
    assert [row["step"] for row in last.rows("val")] == [0, 1, 2, 3]
    assert figures(last) == figures(whole)
    left, expected = (sorted(path.name for path in (run.log_dir / "checkpoints").iterdir()) for run in (last, whole))
    assert left == expected


def test_a_stop_in_the_evaluation_of_the_test_split(inputs: Inputs, tmp_path: Path) -> None:
    """Everything else is saved."""
    names = f"train: [{inputs.train}], validation: [{inputs.validation}], test: [{inputs.validation}]"
    options = [f"model.data.data_prefix={{{names}}}"]
    run = stopped(inputs, tmp_path, "can_be_requeued", "while_testing", options=options)
    assert asked_for(run) == "step 3, 0 reference log-probs", run.output
    assert not (tmp_path / "checkpoints" / "megatron_gpt.nemo").exists()
    again = stopped(inputs, tmp_path, "never_asked", options=options)
    assert len(again.rows("test")) == 1
    assert (tmp_path / "checkpoints" / "megatron_gpt.nemo").exists()


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that is not asked."""
    return stopped(inputs, tmp_path_factory.mktemp("whole"), "can_be_requeued")


def test_a_run_that_ends_by_itself_leaves_no_file(whole: Run) -> None:
    assert whole.status == 0
    assert asked_for(whole) is None


def test_a_request_during_the_export_comes_too_late(inputs: Inputs, tmp_path: Path) -> None:
    run = stopped(inputs, tmp_path, "of_a_slurm_job", "while_exporting")
    assert run.status == 0, run.output
    assert asked_for(run) is None
    assert (tmp_path / "checkpoints" / "megatron_gpt.nemo").is_file()


@pytest.mark.parametrize(
    ("moment", "asked"),
    [("once_more_while_saving", "step 1, 0 reference log-probs"), ("terminated_while_saving", None)],
)
def test_more_signals_during_the_save_do_no_harm(
    inputs: Inputs, tmp_path: Path, moment: str, asked: str | None
) -> None:
    """But what is cancelled while it saves for a requeue does not ask for one."""
    run = stopped(inputs, tmp_path, "can_be_requeued", moment)
    assert run.status == 0, run.output
    assert saved_steps(tmp_path) == [1]
    assert asked_for(run) == asked


def test_a_requeued_job_goes_on_whatever_its_arguments_say_of_its_beginning(
    inputs: Inputs, whole: Run, tmp_path: Path
) -> None:
    afresh = ["exp_manager.resume_if_exists=false"]
    stopped(inputs, tmp_path, "of_job_seven", "in_the_first_step", options=afresh)
    other = stopped(inputs, tmp_path, "of_a_slurm_job", options=afresh)
    assert other.status == 2 and "asks for a new run" in other.output, "another job"
    again = stopped(inputs, tmp_path, "of_job_seven_again", options=afresh)
    assert again.status == 0, again.output
    assert figures(again) == figures(whole)


def test_a_stop_that_nothing_is_saved_for_is_a_failure(inputs: Inputs, tmp_path: Path) -> None:
    options = ["exp_manager.create_checkpoint_callback=false"]
    options += ["exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false"]
    run = stopped(inputs, tmp_path, "can_be_requeued", "in_the_first_step", options=options)
    assert run.status == 1, run.output
    assert "after step 1 of 3: nothing is saved" in run.output
    assert asked_for(run) is None


def test_a_terminated_slurm_job_saves_and_waits(inputs: Inputs, tmp_path: Path) -> None:
    """It is still there for Slurm to end, and ends at once then; it does not ask for a requeue."""
    run = stopped(inputs, tmp_path, "of_a_slurm_job", "terminated_in_the_first_step")
    assert "waiting for Slurm to end or requeue the job" in run.output
    assert run.status == -signal.SIGTERM
    assert saved_steps(tmp_path) == [1]
    assert asked_for(run) is None


def test_a_terminated_process_without_slurm_saves_and_ends(inputs: Inputs, tmp_path: Path) -> None:
    run = stopped(inputs, tmp_path, "can_be_requeued", "terminated_in_the_first_step")
    assert run.status == 0, run.output
    assert saved_steps(tmp_path) == [1]
    assert asked_for(run) is None


WANDB = ["exp_manager.create_wandb_logger=true", "++exp_manager.wandb_logger_kwargs.offline=true"]


def test_the_end_of_wandb_keeps_no_run_from_saving(inputs: Inputs, tmp_path: Path) -> None:
    run = stopped(inputs, tmp_path, "can_be_requeued", "terminated_with_all_children", options=WANDB)
    assert run.status == 0, run.output
    assert run.output.count("Weights & Biases has failed (") == 1, run.output
    assert saved_steps(tmp_path) == [1]
    assert run.series("train", "loss"), "metrics.jsonl has them"


def test_wandb_gets_every_step_once(inputs: Inputs, tmp_path: Path) -> None:
    """Of ranks that are forked, too, which end without Python's exit handlers."""
    options = [*WANDB, "trainer.devices=2"]
    first = stopped(inputs, tmp_path, "can_be_requeued", "in_the_first_step", options=options)
    assert asked_for(first) == "step 1, 0 reference log-probs", first.output
    assert wandb_steps(tmp_path) == (1, [0])
    stopped(inputs, tmp_path, "never_asked", options=options)
    assert wandb_steps(tmp_path) == (1, [0, 1, 2])


def test_signals_from_the_first_moment_to_the_last(inputs: Inputs, tmp_path: Path) -> None:
    """A new process under a shell as in slurm/common.sh, ten times a second: no moment at which SIGUSR1 kills."""
    arguments = [*inputs.arguments(), *OPTIONS, "exp_manager.explicit_log_dir=log"]
    shell = ["bash", "-c", 'trap "" USR1; touch ready; exec "$@"', "_"]
    process = start([*shell, sys.executable, SCRIPT, *arguments], tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    run = ended(process)
    assert run.status == 0, run.output
    assert "(SIGUSR1); start again to resume" in run.output
