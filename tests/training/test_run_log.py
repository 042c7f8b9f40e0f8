"""Where a run writes, what a resumed run drops from metrics.jsonl, and what a fresh one keeps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.checkpoint import SaveError
from nemo_dpo.config import Config, to_yaml
from nemo_dpo.config.exp_manager import ExpManagerConfig
from nemo_dpo.training.resume import Place
from nemo_dpo.training.run_log import JsonlLogger, log_dir_of, read_metrics, save_run_facts

DATE = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"


def log_dir(folder: Path, **settings: Any) -> Path:
    """With exp_dir=`folder`, as a path below it."""
    settings = {"explicit_log_dir": None, "name": "run", "max_time_per_run": None, **settings}
    return log_dir_of(ExpManagerConfig(exp_dir=str(folder), **settings)).relative_to(folder)


def test_an_explicit_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = ExpManagerConfig(explicit_log_dir="results/a", exp_dir="elsewhere", version="7", max_time_per_run=None)
    assert log_dir_of(cfg) == tmp_path / "results" / "a"


def test_exp_dir_is_nemos_when_it_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = ExpManagerConfig(explicit_log_dir=None, name="run", version="v1", max_time_per_run=None)
    assert log_dir_of(cfg) == tmp_path / "nemo_experiments" / "run" / "v1"


def test_a_run_that_may_resume_has_no_version_of_its_own(tmp_path: Path) -> None:
    assert log_dir(tmp_path, resume_if_exists=True) == Path("run")
    assert log_dir(tmp_path, resume_if_exists=True, version="v1") == Path("run/v1")


def test_versions_by_date(tmp_path: Path) -> None:
    name, version = log_dir(tmp_path, resume_if_exists=False).parts
    assert name == "run" and re.fullmatch(DATE, version)


@pytest.mark.parametrize(
    ("there", "version"),
    [([], 0), (["version_0"], 1), (["version_2", "version_10"], 11), (["version_old", "version_3", "7"], 4)],
)
def test_versions_by_number(tmp_path: Path, there: list[str], version: int) -> None:
    for name in there:
        (tmp_path / "run" / name).mkdir(parents=True)
    settings = {"resume_if_exists": False, "use_datetime_version": False}
    assert log_dir(tmp_path, **settings) == Path(f"run/version_{version}")


ROWS = [
    {"step": 0, "val/loss": 0.69},
    {"step": 0, "train/loss": 0.69},
    {"step": 1, "train/loss": 0.68},
    {"step": 2, "val/loss": 0.67},  # then comes the save at step 2
    {"step": 2, "train/loss": 0.66},
    {"step": 3, "train/loss": 0.65},
    {"step": 4, "val/loss": 0.64},
]


def rows_after_resume(path: Path, step: int, *, validation_due: bool = False) -> list[dict[str, Any]]:
    JsonlLogger(path, Place(step, validation_due))
    return read_metrics(path)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 2), (2, 4), (3, 5), (4, 7), (9, 7)])
def test_a_resumed_run_drops_what_it_will_log_again(tmp_path: Path, step: int, kept: int) -> None:
    """Resuming at k, the next rows are training at k and validation after it; a start validates first."""
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS)
    assert rows_after_resume(path, step) == ROWS[:kept]


def test_a_validation_that_is_due_is_logged_again(tmp_path: Path) -> None:
    """An earlier start has made it, and saved nothing since."""
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS)
    assert rows_after_resume(path, 2, validation_due=True) == ROWS[:3]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS[:3])
    with path.open("a") as file:
        file.write('{"step": 2, "val/lo')
    assert rows_after_resume(path, 2) == ROWS[:3]
    JsonlLogger(path, Place(2, validation_due=False)).log_metrics({"val/loss": 0.5}, 2)
    assert read_metrics(path) == [*ROWS[:3], {"step": 2, "val/loss": 0.5}]


def test_a_fresh_log(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    logger = JsonlLogger(path, Place())
    for row in ROWS:
        logger.log_metrics({name: value for name, value in row.items() if name != "step"}, row["step"])
    assert read_metrics(path) == ROWS


def test_a_fresh_start_sets_the_figures_of_earlier_runs_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for loss in (0.1, 0.2, 0.3):
        JsonlLogger(path, Place()).log_metrics({"train/loss": loss}, 0)
    kept = [read_metrics(tmp_path / name)[0]["train/loss"] for name in ("metrics_1.jsonl", "metrics_2.jsonl")]
    assert kept == [0.1, 0.2]
    assert read_metrics(path) == [{"step": 0, "train/loss": 0.3}]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, Place())
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(SaveError, match=r"metrics\.jsonl: cannot be written \(No space left on device\); make space"):
        logger.log_metrics({"train/loss": 0.5}, 0)


def test_each_start_keeps_the_configuration_of_the_earlier_ones(tmp_path: Path) -> None:
    starts = [Config(), Config(), Config(allow_unverified=True), Config()]
    for cfg in starts:
        save_run_facts(cfg, tmp_path)
    texts = [(tmp_path / "run" / f"config{end}.yaml").read_text() for end in ("_1", "_2", "")]
    assert texts == [to_yaml(cfg) for cfg in starts[1:]], "the second start had the same as the first"
    assert {path.name for path in (tmp_path / "run").glob("versions*")} == {"versions.json"}


def test_the_facts_of_a_run_lie_beside_its_checkpoints(tmp_path: Path) -> None:
    from importlib.metadata import version

    save_run_facts(Config(), tmp_path)
    assert (tmp_path / "run" / "config.yaml").read_text() == to_yaml(Config())
    facts = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert facts["packages"]["torch"] == version("torch")
    assert facts["packages"].keys() >= {"megatron-core", "nemo_toolkit", "lightning", "transformers"}
    assert facts["python"].startswith("3.")


@pytest.mark.parametrize(("revision", "recorded"), [("v1.2-3-gabc", "v1.2-3-gabc"), ("", None), (None, None)])
def test_the_revision_is_that_of_the_image_and_git_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None, recorded: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if revision is not None:
        monkeypatch.setenv("NEMO_DPO_REVISION", revision)
    save_run_facts(Config(), tmp_path)
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["git"] == recorded
