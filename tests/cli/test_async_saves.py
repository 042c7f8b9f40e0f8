"""exp_manager.checkpoint_callback_params.async_save: the same checkpoints, written while training goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nemo_dpo.checkpoint.folders import UNFINISHED
from tests.cli.conftest import Inputs
from tests.cli.launch_support import error_line
from tests.cli.test_resume import figures
from tests.support.checkpoints import state_hash, whole_checkpoints
from tests.support.cli import Run, run_cli

CALLBACK = "exp_manager.checkpoint_callback_params"
# 8 steps, saves after 2, 4, 6 and 8, all of them kept.
ARGUMENTS = (
    "trainer.dpo.save_interval=2",
    "exp_manager.create_checkpoint_callback=true",
    f"{CALLBACK}.save_top_k=-1",
    f'{CALLBACK}.filename="{{step}}"',
    "model.hidden_dropout=0.1",
)
ASYNC = f"{CALLBACK}.async_save=true"


@pytest.fixture(scope="module")
def sync(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_cli([*inputs.arguments(), *ARGUMENTS], tmp_path_factory.mktemp("sync"))


def run(inputs: Inputs, log_dir: Path, patch: str = "", *words: str) -> Run:
    patches = [f"tests.cli.save_faults:{patch}"] if patch else []
    return run_cli([*inputs.arguments(), *ARGUMENTS, ASYNC, *words], log_dir, check=False, patches=patches)


def saved(log_dir: Path) -> list[int]:
    return list(whole_checkpoints(log_dir))


def check_goes_on(inputs: Inputs, log_dir: Path, sync: Run) -> None:
    again = run(inputs, log_dir)
    assert again.status == 0, again.output
    assert figures(again) == figures(sync)
    assert saved(log_dir) == [2, 4, 6, 8]


def test_the_checkpoints_of_a_synchronous_save(inputs: Inputs, sync: Run, tmp_path: Path) -> None:
    """Training goes on while the checkpoint of step 4 is written, and changes nothing in it."""
    background = run(inputs, tmp_path, "slow_while_it_is_written")
    assert background.status == 0, background.output
    assert figures(background) == figures(sync)
    assert saved(tmp_path) == [2, 4, 6, 8]
    expected, found = (
        {step: state_hash(folder) for step, folder in whole_checkpoints(log_dir).items()}
        for log_dir in (sync.log_dir, tmp_path)
    )
    assert found == expected
    assert len(set(expected.values())) == 4
    assert json.loads((tmp_path / "went_on.json").read_text()) > 4, "steps begun when the writing ended"


@pytest.mark.timeout(120)
def test_from_a_process_that_computes_with_threads(inputs: Inputs, sync: Run, tmp_path: Path) -> None:
    """The fork has none of them, and waits for none."""
    background = run(inputs, tmp_path, "compute_with_two_threads")
    assert background.status == 0, background.output
    assert (tmp_path / "threads.json").read_text() == "2"
    assert saved(tmp_path) == [2, 4, 6, 8]
    check_goes_on(inputs, tmp_path, sync)


@pytest.mark.timeout(120)
def test_killed_while_it_is_written(inputs: Inputs, sync: Run, tmp_path: Path) -> None:
    """The checkpoint before it is in force, and what wrote it has died with the run."""
    killed = run(inputs, tmp_path, "kill_while_it_is_written")
    assert killed.status == -9, killed.output
    assert [row["step"] for row in killed.rows("train")][-1] == 4, "a step after the save"
    assert saved(tmp_path) == [2]
    wait_for_end(int((tmp_path / "writer.pid").read_text()))
    check_goes_on(inputs, tmp_path, sync)


def wait_for_end(pid: int) -> None:
    status = Path(f"/proc/{pid}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} lives on")


def test_a_stop_request_waits_for_it_and_saves(inputs: Inputs, sync: Run, tmp_path: Path) -> None:
    stopped = run(inputs, tmp_path, "stop_while_it_is_written")
    assert stopped.status == 0, stopped.output
    assert saved(tmp_path) == [2, 4, 5]
    assert "stopping after step 5: SIGTERM" in stopped.output


def test_a_run_that_fails_gives_it_up(inputs: Inputs, sync: Run, tmp_path: Path) -> None:
    failed = run(inputs, tmp_path, "fail_while_it_is_written")
    assert failed.status == 2, failed.output
    assert error_line(failed.output) == "error: the cache is gone"
    assert saved(tmp_path) == [2]
    wait_for_end(int((tmp_path / "writer.pid").read_text()))


def test_a_run_that_ends_at_a_step_that_is_not_finite_completes_it(inputs: Inputs, sync: Run, tmp_path: Path) -> None:
    """All ranks are at the same place then."""
    two = ["trainer.devices=2", "model.micro_batch_size=1"]
    failed = run(inputs, tmp_path, "no_finite_loss_while_it_is_written", *two)
    assert failed.status == 1, failed.output
    assert "is nan; no parameter was changed" in error_line(failed.output)
    assert saved(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        ("kill_its_writer", "the process that wrote it ended with status -9"),
        ("fill_the_disk", "[Errno 28] No space left on device"),
    ],
)
def test_a_writer_that_fails_ends_the_run_at_the_next_step(
    inputs: Inputs, sync: Run, tmp_path: Path, patch: str, why: str
) -> None:
    failed = run(inputs, tmp_path, patch, "trainer.devices=2", "model.micro_batch_size=1")
    assert failed.status == 1, failed.output
    message = error_line(failed.output)
    assert f"could not write {tmp_path / 'checkpoints' / 'step=4'}: {why}" in message
    assert failed.rows("train")[-1]["step"] in (4, 5), "noticed before the next save"
    assert saved(tmp_path) == [2]
    assert [path for path in (tmp_path / "checkpoints").iterdir() if path.suffix == UNFINISHED] == []
