"""What counts as a checkpoint among the folders that saves, kills and clean-ups leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_dpo.checkpoint import folders
from nemo_dpo.checkpoint.folders import complete_checkpoints, next_save, remove_unfinished


def checkpoint(folder: Path, step: int, save: int = 1) -> Path:
    folder.mkdir()
    (folder / "progress.json").write_text(json.dumps({"step": step, "layout": {}, "save": save}), encoding="utf-8")
    return folder


def test_checkpoints_stand_in_the_order_of_their_saves(tmp_path: Path) -> None:
    """A run that went on from step 4 of another has saved step 6 last."""
    first, far = checkpoint(tmp_path / "a-step=4", 4, save=1), checkpoint(tmp_path / "a-step=12", 12, save=2)
    last = checkpoint(tmp_path / "a-step=6", 6, save=3)
    assert complete_checkpoints(tmp_path) == [first, far, last]


def test_complete_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    """A save that was killed just before its rename has left everything, under the temporary name."""
    newest, older = checkpoint(tmp_path / "a-step=10", 10, save=2), checkpoint(tmp_path / "b-step=9", 9, save=1)
    checkpoint(tmp_path / "c-step=11.unfinished", 11, save=3)
    (tmp_path / "last").symlink_to(newest.name)
    (tmp_path / "d-step=12").mkdir()
    (tmp_path / "model.nemo").touch()
    assert complete_checkpoints(tmp_path) == [older, newest]


@pytest.mark.parametrize("left", ["manifest.json", ".metadata"])
def test_a_checkpoint_that_lost_its_progress_is_still_one(tmp_path: Path, left: str) -> None:
    """It may be the newest: it is looked at first, and passed over aloud."""
    older, damaged = checkpoint(tmp_path / "b-step=9", 9, save=3), tmp_path / "a-step=10"
    damaged.mkdir()
    (damaged / left).touch()
    assert complete_checkpoints(tmp_path) == [older, damaged]
    (damaged / "progress.json").write_text('{"save": 4}')
    assert complete_checkpoints(tmp_path) == [older, damaged]
    assert next_save(tmp_path) == 4, "the readable ones count"


def test_a_removal_leaves_nothing_half_deleted_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, doomed = checkpoint(tmp_path / "a-step=10", 10), checkpoint(tmp_path / "b-step=9", 9)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda _: None)  # where a kill would stop it
    folders.remove(doomed)
    assert complete_checkpoints(tmp_path) == [kept]
    monkeypatch.undo()
    assert len(remove_unfinished(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == [kept]


def test_what_is_unfinished_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept, left = checkpoint(tmp_path / "a-step=10", 10), checkpoint(tmp_path / "c-step=11.unfinished", 11)
    assert remove_unfinished(tmp_path) == [left]
    assert list(tmp_path.iterdir()) == [kept]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    """A save to the name of an earlier checkpoint sets that aside first."""
    kept = checkpoint(tmp_path / "a-val_loss=0.5-step=10.replaced", 10)
    checkpoint(tmp_path / "a-val_loss=0.5-step=10.unfinished", 10)
    done = checkpoint(tmp_path / "b-step=11", 11, save=2)
    checkpoint(tmp_path / "b-step=11.replaced", 11)
    assert complete_checkpoints(tmp_path) == [done]
    remove_unfinished(tmp_path)
    assert complete_checkpoints(tmp_path) == [kept.with_suffix(""), done] == sorted(tmp_path.iterdir())


def test_the_last_step_is_that_of_the_last_save_that_can_be_read(tmp_path: Path) -> None:
    assert folders.last_step(tmp_path) == 0
    checkpoint(tmp_path / "a", 10)
    checkpoint(tmp_path / "b", 9, save=2)
    damaged = checkpoint(tmp_path / "c", 11, save=3)
    (damaged / folders.PROGRESS).write_text("")
    assert complete_checkpoints(tmp_path)[-1] == damaged
    assert folders.last_step(tmp_path) == 9


def test_a_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.unfinished").write_text("")
    assert remove_unfinished(tmp_path) == []


def test_no_folder_no_checkpoint(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "checkpoints") == remove_unfinished(tmp_path / "checkpoints") == []
