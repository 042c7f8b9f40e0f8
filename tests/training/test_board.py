"""Processes of one host that say each text once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from nemo_dpo import launch
from nemo_dpo.data import DataError
from nemo_dpo.training.board import Board


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_each_text_is_news_once(tmp_path: Path) -> None:
    with Board("run") as first, Board("run") as second, Board("other") as other:
        assert [first.is_news("a"), second.is_news("a"), first.is_news("a")] == [True, False, False]
        assert [second.is_news("b\nb"), first.is_news("b\nb")] == [True, False]
        assert other.is_news("a")
    assert list(tmp_path.iterdir()) == []


def test_what_the_first_to_end_has_said_is_known_to_the_others(tmp_path: Path) -> None:
    with Board("run") as late:
        with Board("run") as early:
            assert early.is_news("a")
        assert not late.is_news("a")
    with Board("run") as next_run:
        assert next_run.is_news("a")


def test_a_name_that_somebody_has_linked_elsewhere_is_not_followed(tmp_path: Path) -> None:
    with Board("run"):
        (file,) = tmp_path.iterdir()
    file.symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        Board("run")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(("said", "lines"), [("gone", []), ("another", ["error: gone"])])
def test_a_rank_repeats_nothing_and_is_heard_with_what_is_its_own(
    said: str, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def refuse() -> int:
        raise DataError("gone")

    with Board(f"{os.getppid()}_1") as rank_0:
        assert rank_0.is_news(said)
        assert launch._as_rank(refuse) == 2
    assert capsys.readouterr().err.splitlines() == lines
