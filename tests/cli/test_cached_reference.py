"""model.dpo.reference.kind=cached through the command line: the figures of `frozen`, in every layout, from the disk."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert import hf_to_nemo
from nemo_dpo.reference.table import ROW, Rows
from tests.cli.cached_probes import ROWS_BEFORE_THE_KILL, read_passes
from tests.cli.conftest import GLOBAL_BATCH, TRAIN_PAIRS, VALIDATION_PAIRS, Inputs
from tests.cli.launch_support import ROOT, ended, error_line, start
from tests.cli.test_equivalence import CASES, relative_error, weights_of
from tests.cli.test_resume import ARGUMENTS as RESUMABLE
from tests.cli.test_resume import figures
from tests.support.cli import Run, run_cli
from tests.support.tiny import write_hf_model, write_pairs

TEST_PAIRS = 3
PAIRS = {"train": TRAIN_PAIRS, "validation": VALIDATION_PAIRS, "test": TEST_PAIRS}
CACHED = "model.dpo.reference.kind=cached"
LAYOUTS = ("DP 2", "PP 2", "TP 2", "PP 2 × VPP 2")


@dataclass(frozen=True)
class Setting:
    """A checkpoint, three splits, and arguments of a run of 8 steps that learns."""

    inputs: Inputs
    test: Path

    @property
    def arguments(self) -> list[str]:
        files = f"train: [{self.inputs.train}], validation: [{self.inputs.validation}], test: [{self.test}]"
        return [
            *self.inputs.arguments(),
            f"model.data.data_prefix={{{files}}}",
            "model.data.shuffle=true",
            "model.optim.lr=0.001",
            "model.optim.eps=0.0001",  # see tests/cli/test_equivalence.py
            "model.optim.sched.warmup_steps=0",
        ]


@pytest.fixture(scope="module")
def setting(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(inputs, write_pairs(tmp_path_factory.mktemp("test") / "test.jsonl", TEST_PAIRS, seed=2))


@pytest.fixture(scope="module")
def filled(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case of test_equivalence → the folder that cache_reference filled in that layout, made once."""
    done: dict[str, Path] = {}

    def once(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp("cache")
            run = fill(setting, folder / "cache", folder / "run", *layout(name))
            assert read_passes(run.log_dir) == whole_passes()
            done[name] = folder / "cache"
        return done[name]

    return once


def layout(name: str) -> list[str]:
    return [*CASES[name].arguments, f"trainer.devices={CASES[name].ranks}"]


def in_cache(folder: Path) -> list[str]:
    return [CACHED, f"model.dpo.reference.cache_dir={folder}"]


def fill(setting: Setting, cache: Path, log_dir: Path, *changes: str, check: bool = True) -> Run:
    return run_cli(
        [*setting.arguments, *in_cache(cache), *changes],
        log_dir,
        job="cache_reference",
        check=check,
        patches=["tests.cli.cached_probes:watch_passes"],
    )


def train(setting: Setting, log_dir: Path, *changes: str, patches: tuple[str, ...] = ("watch_passes",)) -> Run:
    return run_cli(
        [*setting.arguments, *changes], log_dir, patches=[f"tests.cli.cached_probes:{patch}" for patch in patches]
    )


def whole_passes() -> list[list[object]]:
    """Every pair of every split once, a global batch at a time."""
    return [
        [split, list(range(start, min(start + GLOBAL_BATCH, count)))]
        for split, count in PAIRS.items()
        for start in range(0, count, GLOBAL_BATCH)
    ]


def tables(folder: Path) -> dict[str, Rows]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(PAIRS)
    found = {split: np.fromfile(folder / split / "rows.bin", ROW) for split in PAIRS}
    assert {split: len(rows) for split, rows in found.items()} == PAIRS
    return found


def assert_same_training(found: Run, expected: Run) -> None:
    for split, steps in (("train", 8), ("val", 2), ("test", 1)):
        for metric in ("loss", "rewards/margins", *(["grad_norm"] if split == "train" else [])):
            values = found.series(split, metric)
            assert len(values) == steps
            # A margin near 0 is a difference of log-probs of about 100, in fp32.
            assert values == pytest.approx(expected.series(split, metric), rel=1e-5, abs=1e-5), (split, metric)


SAVED = ["exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true", "model.hidden_dropout=0.1"]


def test_cached_is_frozen(setting: Setting, tmp_path: Path) -> None:
    """With dropout in the policy: the masks are the same, since a reference pass, in eval mode, draws none."""
    frozen = train(setting, tmp_path / "frozen", *SAVED)
    cached = train(setting, tmp_path / "cached", *SAVED, CACHED)
    assert_same_training(cached, frozen)
    losses = cached.series("train", "loss")
    assert max(losses) - min(losses) > 0.05
    start = weights_of(setting.inputs.nemo)
    updates = [
        {name: value.double() - start[name].double() for name, value in weights_of(nemo).items()}
        for nemo in (run.log_dir / "checkpoints/megatron_gpt.nemo" for run in (cached, frozen))
    ]
    assert relative_error(*updates) <= 1e-4
    assert read_passes(cached.log_dir) == whole_passes()
    for split, count in PAIRS.items():
        assert len(np.fromfile(cached.log_dir / "reference_cache" / split / "rows.bin", ROW)) == count


@pytest.fixture(scope="module")
def frozen(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(setting, tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_fills_the_same_tables(filled: Callable[[str], Path], name: str) -> None:
    expected, found = tables(filled("one process")), tables(filled(name))
    for split in PAIRS:
        assert np.array_equal(found[split]["tokens"], expected[split]["tokens"])
        # Sums of up to 25 log-probs of fp32 logits.
        assert found[split]["logps"] == pytest.approx(expected[split]["logps"], rel=1e-5)
        assert len(np.unique(found[split]["logps"])) == 2 * PAIRS[split]


@pytest.mark.parametrize(
    ("filled_by", "used_by"), [(name, "one process") for name in LAYOUTS] + [("one process", name) for name in LAYOUTS]
)
def test_a_cache_of_one_layout_serves_another(
    filled: Callable[[str], Path], setting: Setting, frozen: Run, tmp_path: Path, filled_by: str, used_by: str
) -> None:
    run = train(setting, tmp_path, *in_cache(filled(filled_by)), *layout(used_by))
    assert read_passes(tmp_path) == []
    assert_same_training(run, frozen)
    for row in (run.rows("train")[0], run.rows("val")[0]):
        assert row["step"] == 0
        # β × what the fp32 log-probs of another layout and padding differ by
        assert abs(row["rewards_chosen_mean"]) <= 1e-4 and abs(row["rewards_rejected_mean"]) <= 1e-4
        assert row["rewards_all_std"] <= 1e-4


def test_there_is_no_second_copy_of_the_weights(
    setting: Setting, filled: Callable[[str], Path], tmp_path: Path
) -> None:
    weighed = []
    for name, arguments in (("frozen", []), ("cached", in_cache(filled("one process")))):
        train(setting, tmp_path / name, *arguments, "trainer.dpo.max_steps=2", patches=("weigh_tensors",))
        weighed.append(json.loads((tmp_path / name / "tensors.json").read_text()))
    with_copy, without = weighed
    assert with_copy["live"] - without["live"] == pytest.approx(without["parameters"], rel=0.02)


@pytest.mark.parametrize("name", ["one process", "DP 2"])
def test_killed_half_way_it_computes_what_is_missing(
    setting: Setting, filled: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    cache = tmp_path / "cache"
    arguments = [*setting.arguments, *in_cache(cache), *layout(name)]
    killed = run_cli(arguments, tmp_path / "killed", check=False, patches=["tests.cli.cached_probes:kill_half_way"])
    assert killed.status == (-signal.SIGKILL if name == "one process" else 128 + signal.SIGKILL), killed.output
    assert [path.name for path in cache.iterdir()] == ["train.unfinished"]
    again = train(setting, tmp_path / "again", *in_cache(cache), *layout(name))
    assert read_passes(again.log_dir) == whole_passes()[ROWS_BEFORE_THE_KILL // GLOBAL_BATCH :]
    expected, found = tables(filled(name)), tables(cache)
    assert all(np.array_equal(found[split], expected[split]) for split in PAIRS)


def test_asked_to_stop_it_stops_after_the_pass(setting: Setting, tmp_path: Path) -> None:
    stopped = train(setting, tmp_path / "run", CACHED, "trainer.devices=2", patches=("stop_half_way",))
    assert "ended while reference log-probs were computed (SIGTERM); start again" in stopped.output
    assert not (stopped.log_dir / "metrics.jsonl").exists()
    train(setting, tmp_path / "run", CACHED)
    assert read_passes(tmp_path / "run") == whole_passes()[1:]


def test_the_time_limit_counts_from_the_start(setting: Setting, tmp_path: Path) -> None:
    limit = "exp_manager.max_time_per_run=00:00:00:01"
    stopped = train(setting, tmp_path / "run", CACHED, limit, patches=("slow_passes", "watch_passes"))
    assert "(exp_manager.max_time_per_run is over); start again" in stopped.output
    assert len(read_passes(tmp_path / "run")) < len(whole_passes())
    assert not (stopped.log_dir / "metrics.jsonl").exists()


def other_data(setting: Setting, folder: Path) -> list[str]:
    others = write_pairs(folder / "others.jsonl", TRAIN_PAIRS, seed=9)
    return [f"model.data.data_prefix={{train: [{others}], validation: [{setting.inputs.validation}]}}"]


def other_weights(_setting: Setting, folder: Path) -> list[str]:
    hf_to_nemo(write_hf_model(folder / "hf", seed=1), folder / "other.nemo", precision="32")
    return [f"pretrained_checkpoint.restore_from_path={folder / 'other.nemo'}"]


def other_shape(setting: Setting, folder: Path) -> list[str]:
    archive.extract(setting.inputs.nemo, folder / "other")
    file = folder / "other" / archive.MODEL_CONFIG
    config = yaml.safe_load(file.read_text()) | {"rotary_base": 20000.0}
    file.write_text(yaml.safe_dump(config))
    return [f"pretrained_checkpoint.restore_from_path={folder / 'other'}"]


CHANGES = {
    "data was": other_data,
    "weights was": other_weights,
    "rotary_base was 10000.0 and is 20000.0": other_shape,
    "precision was fp32 and is bf16": lambda *_: ["trainer.precision=bf16"],
}


@pytest.mark.parametrize("state", ["complete", "unfinished"])
@pytest.mark.parametrize("text", CHANGES)
def test_a_cache_of_something_else_is_refused(
    setting: Setting, filled: Callable[[str], Path], tmp_path: Path, text: str, state: str
) -> None:
    shutil.copytree(filled("one process"), tmp_path / "cache")
    if state == "unfinished":
        (tmp_path / "cache/train").rename(tmp_path / "cache/train.unfinished")
    before = contents(tmp_path / "cache")
    changes = [*in_cache(tmp_path / "cache"), *CHANGES[text](setting, tmp_path)]
    run = run_cli([*setting.arguments, *changes], tmp_path / "run", check=False)
    assert run.status == 2, run.output
    line = error_line(run.output)
    assert text in line and " was " not in line.replace(text, "") and "model.dpo.reference.cache_dir" in line
    assert contents(tmp_path / "cache") == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_truncated_table_is_refused_on_all_ranks(
    setting: Setting, filled: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(filled("one process"), tmp_path / "cache")
    rows = tmp_path / "cache/train/rows.bin"
    rows.write_bytes(rows.read_bytes()[:-1])
    changes = [*in_cache(tmp_path / "cache"), *layout("DP 2")]
    run = run_cli([*setting.arguments, *changes], tmp_path / "run", check=False)
    assert run.status == 2
    assert str(rows) in error_line(run.output) and "delete" in error_line(run.output)


def test_a_resume_reads_or_computes_the_log_probs_of_the_start(setting: Setting, tmp_path: Path) -> None:
    """Not those of the checkpoint that it resumes from."""
    arguments = [*setting.arguments, *RESUMABLE, CACHED]
    whole = run_cli(arguments, tmp_path / "whole")
    run_cli(arguments, tmp_path / "kept", patches=["tests.cli.faults:stop_early"])
    shutil.copytree(tmp_path / "kept", tmp_path / "lost", symlinks=True)
    shutil.rmtree(tmp_path / "lost/reference_cache")
    for name, passes in (("kept", []), ("lost", whole_passes())):
        resumed = run_cli(arguments, tmp_path / name, patches=["tests.cli.cached_probes:watch_passes"])
        assert figures(resumed) == figures(whole)
        assert read_passes(resumed.log_dir) == passes


# The adapter does not start at zero: its log-probs, which `frozen` keeps, are not those of the default kind.
OWN_YAML = """
defaults: [gpt_dpo_schema]
model:
  peft: {peft_scheme: lora, lora_tuning: {row_init_method: normal}}
  dpo: {reference: {kind: frozen, cache_dir: %s}}
"""


def test_the_tool_fills_the_cache_and_ends(setting: Setting, tmp_path: Path) -> None:
    """Of the kind that the training's own yaml names."""
    (tmp_path / "own.yaml").write_text(OWN_YAML % (tmp_path / "cache"))
    words = [f"--config-path={tmp_path}", "--config-name=own", *setting.arguments]
    command = [sys.executable, ROOT / "tools/data/cache_reference.py", *words, "trainer.devices=2"]
    results = f"exp_manager.explicit_log_dir={tmp_path / 'run'}"
    done = ended(start([*command, results], tmp_path))
    assert done.status == 0, done.output
    assert "reference log-probs of train: 100%" in done.output
    assert not (tmp_path / "run/metrics.jsonl").exists()
    effective = yaml.safe_load((tmp_path / "run/run/config.yaml").read_text())
    assert effective["model"]["dpo"]["reference"]["kind"] == "cached:frozen"
    assert tables(tmp_path / "cache").keys() == PAIRS.keys()
    used = train(setting, tmp_path / "used", *words, "model.dpo.reference.kind=cached:frozen")
    assert read_passes(used.log_dir) == []
    # The pairs' log-probs were computed on other ranks, in other micro-batches, as fp32.
    assert used.rows("train")[0]["rewards_all_std"] <= 1e-4
