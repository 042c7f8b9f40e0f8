"""A run stopped and started again is the run that was not, bit for bit; nothing of its state may be missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.convert import hf_to_nemo
from tests.cli.conftest import GLOBAL_BATCH, TRAIN_PAIRS, Inputs
from tests.cli.faults import STOP_AFTER
from tests.cli.probes import read_facts
from tests.cli.test_equivalence import weights_of
from tests.support.cli import Run, run_cli
from tests.support.tiny import write_hf_model, write_pairs

# These differ from run to run.
MEASURED = {"step_time", "validation_step_time", "pairs_per_second", "tokens_per_second", "memory_gib"}
STEPS, VALIDATIONS = 12, [0, 2, 4, 6, 8, 10, 12]  # three epochs of four steps
# Everything that a resume has to bring back is in use: dropout, shuffled data, a learning rate that changes each step.
ARGUMENTS = [
    "trainer.dpo.max_epochs=3",
    "trainer.dpo.val_check_interval=2",
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
    "model.data.shuffle=true",
    "model.optim.lr=0.001",
    "model.optim.sched.name=CosineAnnealing",
    "model.optim.sched.warmup_steps=2",
    "model.optim.sched.constant_steps=2",
    "model.optim.sched.min_lr=0.0001",
]
RANKS_2 = ["trainer.devices=2"]
TP_2, PP_2 = [*RANKS_2, "model.tensor_model_parallel_size=2"], [*RANKS_2, "model.pipeline_model_parallel_size=2"]


@dataclass(frozen=True)
class Case:
    optimizer: str
    precision: str
    layout: list[str]

    @property
    def arguments(self) -> list[str]:
        momentum = ["model.optim.momentum=0.9"] if self.optimizer == "sgd" else []
        return [f"model.optim.name={self.optimizer}", *momentum, *self.layout]


CASES = {
    "1 process, adam": Case("adam", "32", []),
    "1 process, sgd": Case("sgd", "32", []),
    "DP 2, distributed": Case("mcore_distributed_optim", "32", RANKS_2),
    "DP 2, distributed, bf16": Case("mcore_distributed_optim", "bf16", RANKS_2),
    "TP 2, adam, bf16": Case("adam", "bf16", TP_2),
    "TP 2, distributed": Case("mcore_distributed_optim", "32", TP_2),
    "PP 2, sgd, bf16": Case("sgd", "bf16", PP_2),
    "PP 2, distributed": Case("mcore_distributed_optim", "32", PP_2),
}
DP_2 = "DP 2, distributed"


@dataclass(frozen=True)
class Halves:
    """One run that went through, and the folder of the same run stopped after STOP_AFTER steps."""

    arguments: list[str]
    whole: Run
    stopped: Run

    def resume(self, log_dir: Path, *changes: str, **options: Any) -> Run:
        """Start again in a copy of the stopped run's folder."""
        shutil.copytree(self.stopped.log_dir, log_dir, symlinks=True)
        return run_cli([*self.arguments, *changes], log_dir, **options)


@pytest.fixture(scope="module")
def halves(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Halves]:
    """(case, further arguments) → both runs, made once."""
    done: dict[tuple[str, ...], Halves] = {}

    def once(name: str, *changes: str) -> Halves:
        if (name, *changes) not in done:
            case = CASES[name]
            arguments = [*inputs.arguments(case.precision), *ARGUMENTS, *case.arguments, *changes]
            folder = tmp_path_factory.mktemp("halves")
            whole = run_cli(arguments, folder / "whole")
            stopped = run_cli(arguments, folder / "stopped", patches=["tests.cli.faults:stop_early"])
            assert [row["step"] for row in stopped.rows("train")] == list(range(STOP_AFTER)), stopped.output
            done[(name, *changes)] = Halves(arguments, whole, stopped)
        return done[(name, *changes)]

    return once


def figures(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Every metric of every step, as written, but those that a clock or the system measures."""
    return {
        split: [{name: value for name, value in row.items() if name not in MEASURED} for row in run.rows(split)]
        for split in ("train", "val")
    }


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_resumed_is_uninterrupted(halves: Callable[..., Halves], tmp_path: Path, name: str) -> None:
    runs = halves(name)
    resumed = runs.resume(tmp_path / "run", patches=["tests.cli.probes:watch"])
    assert all(len(facts["steps"]) == STEPS - STOP_AFTER for facts in read_facts(resumed.log_dir))
    assert [row["step"] for row in resumed.rows("train")] == list(range(STEPS))
    assert [row["step"] for row in resumed.rows("val")] == VALIDATIONS
    assert figures(resumed) == figures(runs.whole)
    expected, found = (weights_of(run.log_dir / "checkpoints/megatron_gpt.nemo") for run in (runs.whole, resumed))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_progress_bar_ends_at_the_last_step(halves: Callable[..., Halves], tmp_path: Path) -> None:
    """Without a terminal it is drawn every tenth step, and where the run ends: early, resumed or whole."""
    runs = halves(DP_2)
    resumed = runs.resume(tmp_path / "run")
    last = [
        re.findall(r" (\d+/\d+) \[.*?loss=(\d\.\d+)", run.output)[-1] for run in (runs.stopped, resumed, runs.whole)
    ]
    assert not re.search(r"Epoch \d", runs.whole.output), "Lightning's one epoch is no epoch of the run's three"
    losses = [f"{run.series('train', 'loss')[-1]:.3f}" for run in (runs.stopped, resumed, runs.whole)]
    assert last == list(zip([f"{STOP_AFTER}/{STEPS}", f"{STEPS}/{STEPS}", f"{STEPS}/{STEPS}"], losses, strict=True))


# What is forgotten, and how many steps after the restart still come out right: what is wrong in the update shows in the
# next step's loss. own_steps: megatron-core's loader gives all parameters one `step` tensor (mcore_repairs).
FORGOTTEN = {"rng": 0, "sampler": 0, "schedule": 0, "optimizer": 1, "own_steps": 1}


@pytest.mark.parametrize("part", FORGOTTEN)
def test_a_resume_that_forgets_a_part_is_noticed(halves: Callable[..., Halves], tmp_path: Path, part: str) -> None:
    """The comparison above depends on each part."""
    runs = halves(DP_2)
    resumed = runs.resume(tmp_path / "run", patches=[f"tests.cli.faults:forget_{part}"])
    expected, found = figures(runs.whole)["train"], figures(resumed)["train"]
    assert [row["step"] for row in found] == list(range(STEPS))
    same = [a == b for a, b in zip(found, expected, strict=True)]
    assert same.index(False) == STOP_AFTER + FORGOTTEN[part]


@pytest.mark.parametrize("layout", [PP_2, ["trainer.devices=1", "model.tensor_model_parallel_size=1"]], ids=["PP", "1"])
@pytest.mark.parametrize("name", ["TP 2, adam", "TP 2, distributed"])
def test_continues_in_another_layout(
    halves: Callable[..., Halves], tmp_path: Path, name: str, layout: list[str]
) -> None:
    """Without dropout, whose masks depend on the layout: as close as the layouts are without a restart."""
    changes = ["model.hidden_dropout=0", "model.attention_dropout=0", "model.optim.eps=0.0001", *OPTIMIZER_OF[name]]
    runs = halves("TP 2, distributed", *changes)
    resumed = runs.resume(tmp_path / "run", "model.tensor_model_parallel_size=1", *layout)
    for metric in ("loss", "grad_norm"):
        assert resumed.series("train", metric) == pytest.approx(runs.whole.series("train", metric), rel=1e-5)
    assert resumed.series("train", "lr") == runs.whole.series("train", "lr")
    assert len(resumed.rows("train")) == STEPS


OPTIMIZER_OF = {"TP 2, adam": ["model.optim.name=adam"], "TP 2, distributed": []}


STEERED = [
    "trainer.dpo.max_epochs=4",
    "model.optim.lr=0.002",
    "model.optim.weight_decay=0.3",
    "model.optim.betas=[0.8,0.95]",
    "model.optim.eps=1e-7",
    "model.optim.sched.warmup_steps=4",
    "model.optim.sched.constant_steps=1",
    "model.optim.sched.min_lr=0.0003",
]


@pytest.mark.parametrize(("name", "more"), [(DP_2, []), ("TP 2, adam, bf16", []), ("1 process, sgd", ["momentum=0.5"])])
def test_a_resume_obeys_the_configuration_of_its_start(
    halves: Callable[..., Halves], tmp_path: Path, name: str, more: list[str]
) -> None:
    """Each update is made with the options that a run under them from its first step on would make it with."""
    runs, changes = halves(name), [*STEERED, *(f"model.optim.{key}" for key in more)]
    resumed = runs.resume(tmp_path / "resumed", *changes, patches=["tests.cli.probes:watch_options"])
    whole = run_cli([*runs.arguments, *changes], tmp_path / "whole", patches=["tests.cli.probes:watch_options"])
    assert read_facts(resumed.log_dir) == [options[STOP_AFTER:] for options in read_facts(whole.log_dir)]
    assert resumed.series("train", "lr")[STOP_AFTER:] == whole.series("train", "lr")[STOP_AFTER:]
    assert len(resumed.rows("train")) == 16
    for text in ("max_steps was 12 and is 16", "model.optim.lr was 0.001 and is 0.002", "betas was [0.9, 0.98] and is"):
        assert resumed.output.count(f"{text}") == 1, resumed.output
    assert "model.optim.momentum was" in resumed.output or not more
    assert (resumed.log_dir / "run" / "config_1.yaml").read_text() == (
        (runs.stopped.log_dir / "run" / "config.yaml").read_text()
    ), "what the first steps were made with is still to be read"


def test_a_changed_run_is_refused_by_name(halves: Callable[..., Halves], inputs: Inputs, tmp_path: Path) -> None:
    others = write_pairs(tmp_path / "others.jsonl", TRAIN_PAIRS, seed=9)
    hf_to_nemo(write_hf_model(tmp_path / "hf", seed=9), tmp_path / "other.nemo", precision="32")
    rewarded = with_rewards(inputs.train, tmp_path / "rewarded.jsonl")
    changes = {
        "starting_weights": f"pretrained_checkpoint.restore_from_path={tmp_path / 'other.nemo'}",
        "model.dpo.ref_policy_kl_penalty": "model.dpo.ref_policy_kl_penalty=0.7",
        "model.dpo.preference_loss": "model.dpo.preference_loss=ipo",
        "model.optim.name": "model.optim.name=sgd",
        "steps_per_epoch": "model.data.drop_last=true",
        "shuffle": "model.data.shuffle=false",
        "train_data": f"model.data.data_prefix={{train: [{others}], validation: [{inputs.validation}]}}",
        "train_rewards": f"model.data.data_prefix={{train: [{rewarded}], validation: [{inputs.validation}]}}",
        "validation_data": f"model.data.data_prefix={{train: [{inputs.train}], validation: [{others}]}}",
        "global_batch_size": f"model.global_batch_size={2 * GLOBAL_BATCH}",
        "seed": "model.seed=4321",
    }
    for name, change in changes.items():
        run = halves(DP_2).resume(tmp_path / name, change, check=False)
        assert run.status == 2, run.output
        assert f"error: cannot resume: {name} was " in run.output
        assert len(run.rows("train")) == STOP_AFTER  # nothing is lost by the refusal


def test_data_that_change_during_a_run(inputs: Inputs, tmp_path: Path) -> None:
    """It has read them: it ends as it would have. The next start, with other pairs, is refused."""
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    shutil.copy(inputs.train, train)
    shutil.copy(inputs.validation, valid)
    files = [f"model.data.data_prefix={{train: [{train}], validation: [{valid}]}}", "trainer.dpo.max_steps=3"]
    arguments = [*inputs.arguments(), *ARGUMENTS, *files]
    expected = run_cli(arguments, tmp_path / "whole")
    changed = run_cli(arguments, tmp_path / "changed", patches=["tests.cli.faults:change_the_data"])
    assert train.read_bytes() != inputs.train.read_bytes()
    assert figures(changed) == figures(expected)
    again = run_cli([*arguments, "trainer.dpo.max_steps=4"], tmp_path / "changed", check=False)
    assert again.status == 2, again.output
    assert "error: cannot resume: train_data was" in again.output


def with_rewards(source: Path, target: Path) -> Path:
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    target.write_text("".join(json.dumps({**row, "chosen_reward": 3.5}) + "\n" for row in rows))
    return target


def test_the_best_checkpoints_are_remembered(inputs: Inputs, tmp_path: Path) -> None:
    """The two best were saved before the restart and the second of them is not the newest then."""
    arguments = [
        *inputs.arguments(),
        *ARGUMENTS,
        "trainer.dpo.val_check_interval=1",
        "trainer.dpo.save_interval=1",
        "trainer.dpo.max_steps=6",
        "exp_manager.checkpoint_callback_params.save_top_k=2",
        "model.optim.name=adam",
        "model.optim.lr=0.003",
    ]
    run_cli(arguments, tmp_path, patches=["tests.cli.faults:stop_early"])
    run = run_cli(arguments, tmp_path)
    losses = {row["step"]: row["loss"] for row in run.rows("val") if row["step"]}
    best = sorted(losses, key=losses.__getitem__)[:2]
    assert max(best) <= STOP_AFTER
    assert saved_steps(tmp_path) == sorted([*best, 6])
    assert json.loads((tmp_path / "checkpoints/last/progress.json").read_text())["step"] == 6
    assert (tmp_path / "checkpoints/last").is_symlink()


def saved_steps(log_dir: Path) -> list[int]:
    folders = [folder for folder in (log_dir / "checkpoints").iterdir() if folder.is_dir() and not folder.is_symlink()]
    return sorted(json.loads((folder / "progress.json").read_text())["step"] for folder in folders)


def test_a_finished_run_started_again_repeats_nothing(inputs: Inputs, tmp_path: Path) -> None:
    splits = f"{{train: [{inputs.train}], validation: [{inputs.validation}], test: [{inputs.validation}]}}"
    arguments = [*inputs.arguments(), *ARGUMENTS, "trainer.dpo.max_steps=2", f"model.data.data_prefix={splits}"]
    first, second = (run_cli(arguments, tmp_path) for _ in range(2))
    assert [row["step"] for row in second.rows("train")] == [0, 1]
    assert [row["step"] for row in second.rows("val")] == [0, 2]
    assert [row["step"] for row in second.rows("test")] == [2]
    assert saved_steps(tmp_path) == [2]
    assert "trained model" in second.output.removeprefix(first.output)
