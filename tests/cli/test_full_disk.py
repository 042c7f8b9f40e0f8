"""A disk without room for a checkpoint: said as early as it is known, by every rank, and nothing is lost by it.

Real file systems of a few megabytes; a checkpoint of these runs takes 3 MB.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Inputs
from tests.cli.launch_support import error_line
from tests.cli.test_resume import figures
from tests.support.checkpoints import whole_checkpoints
from tests.support.cli import Run, run_cli
from tests.support.disk import enlarge, small_disk

CALLBACK = "exp_manager.checkpoint_callback_params"
# 6 steps, saves after 2, 4 and 6, of which the newest is kept.
ARGUMENTS = (
    "trainer.dpo.max_steps=6",
    "trainer.dpo.save_interval=2",
    "exp_manager.create_checkpoint_callback=true",
    f"{CALLBACK}.save_top_k=0",
    f'{CALLBACK}.filename="{{step}}"',
)
EARLIER = "Earlier checkpoints are untouched; make space and start again"


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_cli([*inputs.arguments(), *ARGUMENTS], tmp_path_factory.mktemp("whole"))


def check_goes_on(inputs: Inputs, log_dir: Path, whole: Run, *words: str) -> None:
    again = run_cli([*inputs.arguments(), *ARGUMENTS, *words], log_dir)
    assert [row["loss"] for row in again.rows("train")] == pytest.approx(whole.series("train", "loss"), rel=1e-5)
    assert list(whole_checkpoints(log_dir)) == [6]
    assert {path.name for path in (log_dir / "checkpoints").iterdir()} == {"last", "step=6"}


def test_no_room_for_one(inputs: Inputs, tmp_path: Path) -> None:
    """Refused before the first step."""
    with small_disk(tmp_path / "checkpoints", "2m"):
        run = run_cli([*inputs.arguments(), *ARGUMENTS], tmp_path, check=False)
    assert run.status == 2, run.output
    assert "a checkpoint of this run takes about 2.6 MiB and 2.0 MiB are free" in error_line(run.output)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_no_room_for_the_next_one(inputs: Inputs, whole: Run, tmp_path: Path) -> None:
    """Said after the save before it, two steps ahead; then nothing is begun that cannot be finished."""
    with small_disk(tmp_path / "checkpoints", "5m"):
        run = run_cli([*inputs.arguments(), *ARGUMENTS], tmp_path, check=False)
        assert run.status == 1, run.output
        warning, failure = run.output.index("the next save will fail: it takes about"), run.output.index("error: ")
        assert warning < failure
        message = error_line(run.output)
        assert f"could not write {tmp_path / 'checkpoints' / 'step=4'}: it takes 2.7 MiB, " in message
        assert f"MiB more than are free (2.1 MiB were left on the disk). {EARLIER}" in message
        assert list(whole_checkpoints(tmp_path)) == [2]
        enlarge(tmp_path / "checkpoints", "64m")
        check_goes_on(inputs, tmp_path, whole)
        assert figures(Run(0, "", tmp_path)) == figures(whole)


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("eat_the_disk_while_tensors_are_written", []),
        ("eat_the_disk_while_tensors_are_written", [f"{CALLBACK}.async_save=true"]),
        ("eat_the_disk_while_rank_zero_completes", ["trainer.devices=2"]),
    ],
)
@pytest.mark.timeout(120)
def test_room_that_is_taken_meanwhile(inputs: Inputs, whole: Run, tmp_path: Path, patch: str, words: list[str]) -> None:
    """There was room when the save began; another program takes it before the save ends."""
    folder = tmp_path / "checkpoints"
    with small_disk(folder, "12m"):
        patches = [f"tests.cli.save_faults:{patch}"]
        run = run_cli([*inputs.arguments(), *ARGUMENTS, *words], tmp_path, check=False, patches=patches)
        assert run.status == 1, run.output
        message = error_line(run.output)
        assert f"could not write {folder / 'step=4'}: " in message
        assert EARLIER in message
        assert list(whole_checkpoints(tmp_path)) == [2]
        (folder / "filler").unlink()
        check_goes_on(inputs, tmp_path, whole, *words)
