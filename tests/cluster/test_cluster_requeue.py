"""Stopped by Slurm's own signals and started again, any number of times, a run is the run that was not, bit for bit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_dpo.checkpoint.folders import complete_checkpoints, read_progress
from tests.cli.launch_support import QUICK, ROOT, Inputs
from tests.cli.test_resume import figures
from tests.cluster.batch import Run, finished
from tests.support import cli
from tests.support.offline_wandb import wandb_steps
from tests.support.slurm import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

# Of each kind, on each network. Fewer for a quick look: NEMO_DPO_STOPS=1 make test-cluster.
STOPS = int(os.environ.get("NEMO_DPO_STOPS", "5"))
STEPS = 120
# Everything that a restart has to bring back is in use; 2 × 2 ranks.
ARGUMENTS = [
    *QUICK,
    "model.global_batch_size=4",
    "trainer.dpo.max_epochs=20",
    "trainer.dpo.val_check_interval=10",
    "exp_manager.checkpoint_callback_params.save_top_k=0",
    "model.tensor_model_parallel_size=2",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
]
# With a validation and a save after each step it takes more than a minute. Its training is the same.
SLOW = [*ARGUMENTS, "trainer.dpo.val_check_interval=1", "trainer.dpo.save_interval=1"]
WANDB = ["exp_manager.create_wandb_logger=true"]


@pytest.fixture(scope="session")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> cli.Run:
    """The run that nothing interrupts, as four processes of this host."""
    run = cli.run_cli([*inputs.arguments[:2], *ARGUMENTS, "trainer.devices=4"], tmp_path_factory.mktemp("whole"))
    assert len(run.rows("train")) == STEPS
    return run


@pytest.fixture
def run(odd_inputs: Inputs, results: Path) -> Run:
    """The run that is interrupted."""
    return Run(odd_inputs, results)


def check_whole(run: Run, whole: cli.Run) -> None:
    """Each step once, all figures those of the uninterrupted run."""
    assert figures(cli.Run(0, "", run.results)) == figures(whole), run.said()


def check_training(run: Run, whole: cli.Run) -> None:
    """The same of a run that has validated more often."""
    found = cli.Run(0, "", run.results)
    assert figures(found)["train"] == figures(whole)["train"], run.said()
    assert [row["step"] for row in found.rows("val")] == list(range(STEPS + 1)), run.said()


def new_steps(run: Run) -> Callable[[], bool]:
    """Whether the run has made steps since."""
    before = run.last_step()
    return lambda: run.last_step() > before


def restarts(slurm: Cluster, job: str, count: int) -> Callable[[], bool]:
    return lambda: int(slurm.fact(job, "Restarts")) >= count


def test_requeued_by_itself_when_its_time_is_nearly_over(slurm: Cluster, run: Run, whole: cli.Run) -> None:
    """SIGUSR1, as Slurm sends it before the limit: three times in a row, as impatient people do."""
    job = run.submit(slurm, "train_gpt_dpo.sbatch", [*ARGUMENTS, *WANDB])
    for count in range(1, STOPS + 1):
        slurm.wait(job, until=new_steps(run))
        for _ in range(3):
            slurm.run("scancel", "--signal=USR1", job)
            time.sleep(0.1)
        slurm.wait(job, until=restarts(slurm, job, count))
    finished(slurm, job, run)
    check_whole(run, whole)
    assert int(slurm.fact(job, "Restarts")) == STOPS
    assert wandb_steps(run.results) == (1, list(range(STEPS)))
    assert run.log.read_text().count("asking for a requeue") == STOPS
    assert not list(run.results.glob("requeue*"))


def test_requeued_by_slurm_when_it_is_preempted(slurm: Cluster, run: Run, whole: cli.Run) -> None:
    """An urgent job takes both nodes. What Slurm sends then is SIGTERM."""
    job = run.submit(slurm, "train_gpt_dpo.sbatch", [*ARGUMENTS, *WANDB])
    for count in range(1, STOPS + 1):
        slurm.wait(job, until=new_steps(run))
        slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=ROOT)
        slurm.wait(job, until=restarts(slurm, job, count))
    finished(slurm, job, run)
    check_whole(run, whole)
    said = run.said()
    assert said.count("waiting for Slurm to end or requeue the job") == STOPS, said
    assert "asking for a requeue" not in said
    runs, steps = wandb_steps(run.results)
    assert runs == 1
    # SIGTERM ends wandb's own process, too, and with it what that has not written yet.
    assert set(steps) <= set(range(STEPS)) and len(set(steps)) == len(steps)


def test_requeued_at_the_time_limit(slurm: Cluster, run: Run, whole: cli.Run) -> None:
    """Slurm itself sends it: it looks every 30 s, and here finds jobs with less than 80 s of their two minutes left."""
    options = ["--time=2", "--signal=USR1@50"]  # sent 30 s earlier at most
    job = run.submit(slurm, "train_gpt_dpo.sbatch", SLOW, options, REQUEUE_LIMIT="20")
    finished(slurm, job, run, seconds=1200)
    check_training(run, whole)
    assert int(slurm.fact(job, "Restarts")) >= 1, "the run was over before the signal; make it longer"
    assert "(SIGUSR1)" in run.said()


def test_a_run_that_limits_itself_is_requeued(slurm: Cluster, run: Run, whole: cli.Run) -> None:
    limited = [*SLOW, "exp_manager.max_time_per_run=00:00:00:20"]
    job = run.submit(slurm, "train_gpt_dpo.sbatch", limited, REQUEUE_LIMIT="20")
    finished(slurm, job, run, seconds=1200)
    check_training(run, whole)
    assert int(slurm.fact(job, "Restarts")) >= 1, "the run was over before its time; make it longer"


def test_what_is_cancelled_stays_so_and_goes_on_when_it_is_submitted_again(
    slurm: Cluster, run: Run, whole: cli.Run
) -> None:
    job = run.submit(slurm, "train_gpt_dpo.sbatch", ARGUMENTS)
    for _ in range(STOPS):
        slurm.wait(job, until=new_steps(run))
        slurm.run("scancel", job)
        assert slurm.wait(job) == "CANCELLED"
        slurm.wait(job, until=lambda job=job: not slurm.run("squeue", "--noheader", f"--jobs={job}"))
        # It was saved at the end of the step in which it was cancelled, and not by the interval.
        assert newest_checkpoint(run) == run.last_step() + 1, run.said()
        time.sleep(3)
        assert slurm.fact(job, "Restarts") == "0"
        job = run.submit(slurm, "train_gpt_dpo.sbatch", ARGUMENTS)
    finished(slurm, job, run)
    check_whole(run, whole)


def newest_checkpoint(run: Run) -> int:
    newest = complete_checkpoints(run.results / "checkpoints")[-1:]
    return int(read_progress(newest[0])["step"]) if newest else 0


def test_requeueing_ends_where_nothing_is_gained(slurm: Cluster, run: Run) -> None:
    """A limit that is over before the first step."""
    hopeless = [*QUICK, "exp_manager.max_time_per_run=00:00:00:00"]
    job = run.submit(slurm, "train_gpt_dpo.sbatch", hopeless, nodes=1, tasks=1, REQUEUE_LIMIT="1")
    assert slurm.wait(job) == "FAILED"
    assert slurm.fact(job, "Restarts") == "1"
    assert "not requeued: 1 restarts in a row ended where the one before had (step 0," in run.log.read_text()
