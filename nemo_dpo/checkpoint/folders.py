"""The folder of a run's checkpoints: what a save, a removal and a kill in the middle of either leave there.

A folder under a final name was complete when it got it. Everything else ends in a suffix of this module, and the next
start puts it right. Neither torch nor megatron-core is imported.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.archive import sync_folder
from nemo_dpo.checkpoint.manifest import MANIFEST

PROGRESS = "progress.json"  # what a person, and the search for the newest checkpoint, may read without torch
UNFINISHED = ".unfinished"
REPLACED = ".replaced"  # a checkpoint that makes room for its successor, between two renames
MARKS = (PROGRESS, MANIFEST, ".metadata")  # a folder with one of them is a checkpoint, if perhaps a damaged one


def read_progress(folder: Path) -> dict[str, Any]:
    """The progress.json of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return dict(json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint of a run: {PROGRESS}: {error}") from error


def complete_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in `root` in the order in which they were saved. Unfinished folders are never listed.

    The order is not that of their steps where a run has gone on from an earlier checkpoint than its last. Those that
    do not say when they were saved, being damaged, come last.
    """
    if not root.is_dir():
        return []
    folders = [f for f in root.iterdir() if f.suffix not in (UNFINISHED, REPLACED) and _is_checkpoint(f)]
    return sorted(folders, key=lambda folder: (*_place(folder), folder.name))


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and any((folder / name).is_file() for name in MARKS)


def _place(folder: Path) -> tuple[float, float]:
    try:
        progress = read_progress(folder)
        return int(progress.get("save", 0)), int(progress["step"])
    except (CheckpointError, LookupError, TypeError, ValueError):
        return math.inf, math.inf


def last_step(root: Path) -> int:
    """The step of the checkpoint in `root` that was saved last, of those that say it; 0 if there is none."""
    return max(_places(root), default=(0, 0))[1]


def next_save(root: Path) -> int:
    """The number of the next save into `root`, from 1."""
    return max(_places(root), default=(0, 0))[0] + 1


def _places(root: Path) -> list[tuple[int, int]]:
    """(number of the save, step) of each checkpoint that says them."""
    found = map(_place, complete_checkpoints(root))
    return [(int(save), int(step)) for save, step in found if math.isfinite(save)]


def remove_unfinished(root: Path) -> list[Path]:
    """Delete what an interrupted save left in `root`, put back what it was about to replace; returns what it left."""
    for old in root.glob("*" + REPLACED):
        if old.with_suffix("").exists():
            shutil.rmtree(old)
        else:
            os.replace(old, old.with_suffix(""))
    left = [f for f in root.iterdir() if f.suffix == UNFINISHED and f.is_dir()] if root.is_dir() else []
    for folder in left:
        shutil.rmtree(folder)
    return left


def free_bytes(folder: Path) -> int:
    """Room on the disk of `folder`, which need not exist."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def unfinished(folder: Path) -> Path:
    """The name of `folder` while it is written."""
    return folder.with_name(folder.name + UNFINISHED)


def commit(folder: Path) -> None:
    """Give what was written as `unfinished(folder)` its final name, once it is on the disk; replaces a predecessor."""
    written = unfinished(folder)
    for path in [*written.rglob("*"), written]:
        sync_folder(path)
    if folder.exists():  # the run was started again from an earlier step
        old = folder.with_name(folder.name + REPLACED)
        os.replace(folder, old)
        os.replace(written, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old)
    else:
        os.replace(written, folder)
    sync_folder(folder.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves no half-deleted one under its name."""
    if not folder.exists():  # an interrupted run deleted it after the save that this one resumed from
        return
    doomed = folder.with_name(folder.name + ".removed" + UNFINISHED)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def point(link: Path, target: str) -> None:
    """Make `link` lead to `target` in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)
    sync_folder(link.parent)
