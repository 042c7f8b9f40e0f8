"""A checkpoint that is not what was written is passed over aloud, or refused; a run never starts afresh instead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_dpo.checkpoint import manifest
from nemo_dpo.checkpoint.folders import complete_checkpoints
from tests.cli.conftest import Inputs
from tests.cli.launch_support import error_line
from tests.support.cli import Run, run_cli

STEPS = 3
# A save after every step, all kept.
ARGUMENTS = (
    "trainer.devices=2",
    f"trainer.dpo.max_steps={STEPS}",
    "trainer.dpo.save_interval=1",
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
    'exp_manager.checkpoint_callback_params.filename="{step}"',
)


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_cli([*inputs.arguments(), *ARGUMENTS], tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole: Run, tmp_path: Path) -> Path:
    shutil.copytree(whole.log_dir, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(("name", "harm"), [("__1_0.distcp", flip), ("progress.json", Path.unlink)])
def test_the_newest_good_one_is_resumed_from(
    inputs: Inputs, whole: Run, copy: Path, name: str, harm: Callable[[Path], object]
) -> None:
    newest, before = (copy / "checkpoints" / f"step={step}" for step in (STEPS, STEPS - 1))
    harm(newest / name)
    cut(before / "common.pt")
    run = run_cli([*inputs.arguments(), *ARGUMENTS], copy)
    said = run.output.removeprefix(whole.output)
    assert said.count("DAMAGED CHECKPOINT PASSED OVER") == 2
    assert f"DAMAGED CHECKPOINT PASSED OVER: {newest / name}" in said
    assert f"DAMAGED CHECKPOINT PASSED OVER: {before / 'common.pt'} has " in said
    assert f"resuming from {copy / 'checkpoints' / 'step=1'}," in said
    assert run.series("train", "loss") == whole.series("train", "loss")
    for folder in (newest, before):
        manifest.check(folder, manifest.read(folder))  # made again


def test_no_good_one_is_an_error(inputs: Inputs, whole: Run, copy: Path) -> None:
    checkpoints = complete_checkpoints(copy / "checkpoints")
    for folder in checkpoints:
        flip(folder / "__0_1.distcp")
    run = run_cli([*inputs.arguments(), *ARGUMENTS], copy, check=False)
    assert run.status == 2
    message = error_line(run.output.removeprefix(whole.output))
    assert f"all {STEPS} checkpoints in {copy / 'checkpoints'} are damaged" in message
    assert complete_checkpoints(copy / "checkpoints") == checkpoints
    assert run.series("train", "loss") == whole.series("train", "loss"), "nothing was begun"


def test_a_damaged_one_that_was_asked_for_is_refused(inputs: Inputs, whole: Run, copy: Path) -> None:
    given = copy / "checkpoints" / "step=2"
    flip(given / "__0_0.distcp")
    asked = f"exp_manager.resume_from_checkpoint='{given}'"
    run = run_cli([*inputs.arguments(), *ARGUMENTS, asked], copy, check=False)
    assert run.status == 2
    message = error_line(run.output.removeprefix(whole.output))
    assert f"exp_manager.resume_from_checkpoint: {given / '__0_0.distcp'} has CRC-32 " in message
