"""A rank that hangs or is gone: the others end in the stated time and say who, and write their stacks."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Inputs
from tests.cli.launch_support import SCRIPT, ended, error_line, make_inputs, start
from tests.cli.test_launch import children, last_step, wait_until
from tests.support.cli import run_cli

LIMIT = 3.0  # seconds


def hung(inputs: Inputs, log_dir: Path, patch: str, *words: str) -> tuple[str, dict[str, str]]:
    """The error line of a run in which `patch` stops a rank, and the stacks that were written, by file."""
    options = ["trainer.devices=2", f"trainer.distributed_timeout_minutes={LIMIT / 60}", *words]
    begin = time.monotonic()
    run = run_cli([*inputs.arguments(), *options], log_dir, check=False, patches=[f"tests.cli.broken_host:{patch}"])
    assert run.status == 1, run.output
    assert [row["step"] for row in run.rows("train")] == [0]
    assert time.monotonic() - begin < 60, "gloo's own time-out is a minute later"
    return error_line(run.output), {path.name: path.read_text() for path in (log_dir / "stacks").iterdir()}


def test_a_stopped_rank_is_named(inputs: Inputs, tmp_path: Path) -> None:
    message, stacks = hung(inputs, tmp_path, "stop_rank_one")
    assert "no progress for 3 s in step 1 (trainer.distributed_timeout_minutes=0.05)" in message
    assert "rank 1 gave no answer: gone, or stopped; rank 0 at " in message
    assert message.endswith(f"Stacks: {tmp_path / 'stacks'}")
    assert stacks.keys() == {"rank_0.txt"}
    assert "rank 0 in step 1\n" in stacks["rank_0.txt"]
    assert " in _train\n" in stacks["rank_0.txt"]


@pytest.mark.faults
def test_so_is_the_rank_that_holds_the_store(inputs: Inputs, tmp_path: Path) -> None:
    message, stacks = hung(inputs, tmp_path, "stop_rank_zero")
    assert "the store that the ranks met at does not answer: rank 0 or its host is gone or stopped" in message
    assert stacks.keys() == {"rank_1.txt"}


def test_a_rank_in_a_call_of_its_own_shows_where(inputs: Inputs, tmp_path: Path) -> None:
    message, stacks = hung(inputs, tmp_path, "fall_asleep")
    assert "rank 1 at broken_host.py:" in message
    assert "rank 0 at " in message
    assert stacks.keys() == {"rank_0.txt", "rank_1.txt"}
    assert "in fall_asleep" not in stacks["rank_0.txt"]
    assert "broken_host.py" in stacks["rank_1.txt"]


def test_so_does_one_that_hangs_in_a_save(inputs: Inputs, tmp_path: Path) -> None:
    saves = ["exp_manager.create_checkpoint_callback=true", "trainer.dpo.save_interval=1"]
    message, stacks = hung(inputs, tmp_path, "fall_asleep_in_a_save", *saves)
    assert "no progress for 3 s in the save after step 1 (" in message
    assert "rank 1 at broken_host.py:" in message
    assert stacks.keys() == {"rank_0.txt", "rank_1.txt"}


# --- a rank that is gone ----------------------------------------------------------------------------------------------


def test_a_killed_rank_is_named_by_parent_and_ranks(inputs: Inputs, tmp_path: Path) -> None:
    """Forked ranks: the parent knows how it ended; the ranks, whose output may go elsewhere, know that it is gone."""
    patches = ["tests.cli.broken_host:kill_rank_one", "tests.cli.broken_host:answer_soon"]
    run = run_cli([*inputs.arguments(), "trainer.devices=2"], tmp_path, check=False, patches=patches)
    assert run.status == 137, run.output
    assert "error: rank 1 was ended by SIGKILL; the others cannot go on" in run.output
    (other,) = (line for line in run.output.splitlines() if "rank 0 lost a connection in step 1" in line)
    assert "rank 1 gave no answer: gone, or stopped" in other
    assert "Traceback" not in run.output


@pytest.mark.faults
@pytest.mark.timeout(200)
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_under_torchrun(tmp_path: Path, signal_name: str) -> None:
    """Four ranks in two pipelines, as users start them; one is killed or stopped in the middle."""
    inputs = make_inputs(tmp_path)
    log_dir = tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    options = ["trainer.devices=4", "model.pipeline_model_parallel_size=2", "trainer.dpo.max_epochs=2000"]
    options += [f"exp_manager.explicit_log_dir={log_dir}", "trainer.distributed_timeout_minutes=0.1"]
    options += ["trainer.dpo.val_check_interval=1.0", "exp_manager.create_checkpoint_callback=false"]
    process = start([*torchrun, SCRIPT, *inputs.arguments, *options], tmp_path)
    wait_until(lambda: last_step(log_dir) >= 5, process, seconds=150)
    victim = next(pid for pid in descendants(process.pid) if environment(pid).get("RANK") == "2")
    os.kill(victim, signal.Signals[signal_name])
    begin = time.monotonic()
    run = ended(process, timeout=100)
    # The limit of 6 s where nothing fails by itself, 1 s to look, 5 s for answers; 30 s until torchrun kills the rank
    # that is stopped, and 15 s for a machine that is busy.
    assert time.monotonic() - begin < {"SIGKILL": 30, "SIGSTOP": 57}[signal_name]
    assert run.status == 1, run.output[-3000:]
    (line,) = (line for line in run.output.splitlines() if line.startswith("error: "))
    assert "rank 2 gave no answer: gone, or stopped" in line
    assert {path.name for path in (log_dir / "stacks").iterdir()} == {"rank_0.txt", "rank_1.txt", "rank_3.txt"}
    assert not Path(f"/proc/{victim}").exists()


def descendants(pid: int) -> list[int]:
    own = children(pid)
    return [*own, *(below for child in own for below in descendants(child))]


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
