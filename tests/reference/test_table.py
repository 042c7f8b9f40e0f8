"""The table of log-probs on disk: whole or not there, continued where it stopped, refused if of something else."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_dpo.checkpoint import CheckpointError, SaveError
from nemo_dpo.reference.table import ROW, Header, Rows, TableWriter, open_table

KEY = {"weights": "aa", "architecture": {"rotary_base": 10000.0, "rope_scaling": None}, "data": "dd"}
HEADER = Header(5, KEY)


def made_rows() -> Rows:
    rows = np.empty(5, ROW)
    rows["logps"] = [[-1.5, -2.5], [-3.0, -4.0], [-5.0, -6.0], [-7.0, -8.0], [-9.0, -10.0]]
    rows["tokens"] = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    return rows


def write(folder: Path, rows: Rows, header: Header = HEADER) -> int:
    """Add `rows`, without giving the table its name; returns how many were there."""
    with closing(TableWriter(folder, header)) as writer:
        done = writer.begin()
        writer.append(rows)
    return done


def complete(folder: Path) -> Path:
    with closing(TableWriter(folder, HEADER)) as writer:
        writer.begin()
        writer.append(made_rows())
        writer.finish()
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = complete(tmp_path / "cache" / "train")
    rows = open_table(folder, HEADER)
    assert isinstance(rows, np.memmap)
    assert rows["logps"][3].tolist() == [-7.0, -8.0]
    assert rows["tokens"].tolist() == made_rows()["tokens"].tolist()
    described = json.loads((folder / "header.json").read_text())
    assert described["columns"] == {"logps": "<f4", "tokens": "<i4"}
    assert described["responses"] == ["chosen", "rejected"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["cache", "train"]


def test_an_unfinished_table_has_no_name_and_goes_on_behind_its_last_whole_row(tmp_path: Path) -> None:
    folder, rows = tmp_path / "train", made_rows()
    assert write(folder, rows[:2]) == 0
    assert not folder.exists()
    with (tmp_path / "train.unfinished/rows.bin").open("ab") as file:
        file.write(rows[2:3].tobytes()[:-1])
    with closing(TableWriter(folder, HEADER)) as writer:
        assert writer.begin() == 2
        writer.append(rows[2:])
        writer.finish()
    assert open_table(folder, HEADER).tobytes() == rows.tobytes()


def test_a_kill_before_the_first_row_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "train.unfinished").mkdir()
    (tmp_path / "train.unfinished/rows.bin").touch()
    assert write(tmp_path / "train", made_rows()[:1]) == 0
    assert write(tmp_path / "train", made_rows()[1:]) == 1


CHANGES = {
    "weights was aa and is bb": Header(5, KEY | {"weights": "bb"}),
    "rotary_base was 10000.0 and is 500000.0": Header(
        5, KEY | {"architecture": {"rotary_base": 500000.0, "rope_scaling": None}}
    ),
    "rope_scaling was None and is {'factor': 8.0}": Header(
        5, KEY | {"architecture": {"rotary_base": 10000.0, "rope_scaling": {"factor": 8.0}}}
    ),
    "adapter was None and is cc": Header(5, KEY | {"adapter": "cc"}),
    "data was dd and is ee; pairs was 5 and is 6": Header(6, KEY | {"data": "ee"}),
}


@pytest.mark.parametrize("text", CHANGES)
def test_another_key_is_refused_by_name(tmp_path: Path, text: str) -> None:
    folder = complete(tmp_path / "train")
    write(tmp_path / "half", made_rows()[:2])
    for refused in (
        lambda: open_table(folder, CHANGES[text]),
        lambda: write(tmp_path / "half", made_rows()[2:], CHANGES[text]),
    ):
        with pytest.raises(CheckpointError) as caught:
            refused()
        assert text in str(caught.value)
        assert "model.dpo.reference.cache_dir" in str(caught.value)
    assert write(tmp_path / "half", made_rows()[2:]) == 2  # nothing was lost


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    folder = complete(tmp_path / "train")
    described = json.loads((folder / "header.json").read_text())
    del described["columns"]["tokens"]
    (folder / "header.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="tokens was None and is <i4"):
        open_table(folder, HEADER)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "not the 80 bytes": lambda folder: os.truncate(folder / "rows.bin", 79),
    "rows.bin: not": lambda folder: (folder / "rows.bin").unlink(),
    "header.json: cannot be read": lambda folder: (folder / "header.json").write_text("{"),
    "header.json: cannot be": lambda folder: (folder / "header.json").unlink(),
    "that all hosts see": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


@pytest.mark.parametrize("text", DAMAGES)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    folder = complete(tmp_path / "train")
    DAMAGES[text](folder)
    with pytest.raises(CheckpointError) as caught:
        open_table(folder, HEADER)
    assert text in str(caught.value)


def test_one_run_at_a_time_fills_a_table(tmp_path: Path) -> None:
    with closing(TableWriter(tmp_path / "train", HEADER)) as first:
        first.begin()
        with (
            closing(TableWriter(tmp_path / "train", HEADER)) as second,
            pytest.raises(CheckpointError, match="another run is filling it"),
        ):
            second.begin()
        first.append(made_rows()[:3])
    assert write(tmp_path / "train", made_rows()[3:]) == 3


def test_a_table_that_another_run_finished_meanwhile_is_whole(tmp_path: Path) -> None:
    """The other run ended between this one's look at the folder and its own beginning."""
    folder = tmp_path / "train"
    with closing(TableWriter(folder, HEADER)) as late:
        complete(folder)
        assert late.begin() == 5
        late.finish()
    assert list(tmp_path.iterdir()) == [folder]
    assert open_table(folder, HEADER).tobytes() == made_rows().tobytes()


def test_a_table_that_is_finished_while_its_lock_is_taken_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The late run has opened the rows under their unfinished name already."""
    folder = tmp_path / "train"
    with closing(TableWriter(folder, HEADER)) as first, closing(TableWriter(folder, HEADER)) as late:
        first.begin()
        first.append(made_rows())
        lock = fcntl.flock

        def finished_first(*arguments: Any) -> None:
            first.finish()
            first.close()
            lock(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", finished_first)
            assert late.begin() == 5
        late.finish()
    assert list(tmp_path.iterdir()) == [folder]
    assert open_table(folder, HEADER).tobytes() == made_rows().tobytes()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent, reason in ((tmp_path / "file", "Not a directory"), (Path("/proc/nothing"), "No such file")):
        with pytest.raises(SaveError, match=f"{parent}.*{reason}"):
            TableWriter(parent / "train", HEADER).begin()


def test_a_table_that_cannot_get_its_name_is_kept(tmp_path: Path) -> None:
    """A file of that name came in the way."""
    folder = tmp_path / "train"
    with closing(TableWriter(folder, HEADER)) as writer:
        writer.begin()
        writer.append(made_rows())
        folder.touch()
        with pytest.raises(SaveError, match=r"train: cannot be written \(Not a directory\)"):
            writer.finish()
    folder.unlink()
    assert write(folder, made_rows()[:0]) == 5


def test_a_full_disk_keeps_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train", made_rows()[:2])

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="No space left on device"):
            write(tmp_path / "train", made_rows()[2:3])
    os.truncate(tmp_path / "train.unfinished/rows.bin", 2 * ROW.itemsize + 3)  # as much as there was room for
    assert write(tmp_path / "train", made_rows()[2:]) == 2
