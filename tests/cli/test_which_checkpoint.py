"""Which folder a run writes to, which checkpoint a start goes on from, and what a fresh start leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Inputs
from tests.cli.faults import STOP_AFTER
from tests.cli.launch_support import error_line
from tests.support.cli import run_cli

SAVES = [
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
    "trainer.dpo.save_interval=2",
    "trainer.dpo.max_steps=6",
]


def checkpoint_at(log_dir: Path, step: int) -> Path:
    files = (log_dir / "checkpoints").glob("megatron*/progress.json")
    return next(file.parent for file in files if json.loads(file.read_text())["step"] == step)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ranks_that_start_at_different_times_share_one_folder(inputs: Inputs, tmp_path: Path) -> None:
    by_date = ["exp_manager.explicit_log_dir=null", f"exp_manager.exp_dir={tmp_path}/runs"]
    arguments = [*inputs.arguments(), *SAVES, "trainer.devices=2", *by_date, "exp_manager.resume_if_exists=false"]
    run_cli(arguments, tmp_path / "log", patches=["tests.cli.faults:own_clocks"])
    (folder,) = (tmp_path / "runs" / "megatron_gpt").iterdir()
    again = f"exp_manager.resume_from_checkpoint='{checkpoint_at(folder, 4)}'"
    assert "resuming from" in run_cli([*arguments, again], tmp_path / "log").output, "the checkpoint is whole"


def test_the_checkpoint_saved_last_is_gone_on_from_whatever_its_step(inputs: Inputs, tmp_path: Path) -> None:
    """A run of 6 steps is taken up again at step 2 and stopped at step 3."""
    arguments = [*inputs.arguments(), *SAVES]
    run_cli(arguments, tmp_path)
    back = f"exp_manager.resume_from_checkpoint='{checkpoint_at(tmp_path, 2)}'"
    run_cli([*arguments, back], tmp_path, patches=["tests.cli.faults:stop_early"])
    assert (tmp_path / "checkpoints" / "last").resolve() == checkpoint_at(tmp_path, STOP_AFTER)
    run = run_cli(arguments, tmp_path)
    assert f"resuming from {checkpoint_at(tmp_path, STOP_AFTER)}, " in run.output
    assert [row["step"] for row in run.rows("train")] == list(range(6))


def test_a_new_run_does_not_mix_with_an_earlier_one(inputs: Inputs, tmp_path: Path) -> None:
    arguments = [*inputs.arguments(), *SAVES]
    run_cli(arguments, tmp_path / "run")
    (tmp_path / "run" / "output.txt").unlink()
    before = contents(tmp_path / "run")
    run = run_cli([*arguments, "exp_manager.resume_if_exists=false"], tmp_path / "run", check=False)
    assert run.status == 2
    assert "holds checkpoints and exp_manager.resume_if_exists=false asks for a new run" in error_line(run.output)
    (tmp_path / "run" / "output.txt").unlink()
    assert contents(tmp_path / "run") == before


def test_a_new_run_keeps_the_figures_of_one_without_checkpoints(inputs: Inputs, tmp_path: Path) -> None:
    first = run_cli([*inputs.arguments(), "trainer.dpo.max_steps=3"], tmp_path)
    losses = first.series("train", "loss")
    second = run_cli([*inputs.arguments(), "trainer.dpo.max_steps=1"], tmp_path)
    assert len(second.rows("train")) == 1
    kept = [json.loads(line) for line in (tmp_path / "metrics_1.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in kept if "train/loss" in row] == losses
