"""From a command to ranks: true launches as users make them, stop requests, and who counts as a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo import launch
from nemo_dpo.checkpoint import archive, folders
from nemo_dpo.config import Config, ConfigError
from nemo_dpo.config.schema import ModelConfig, TrainerConfig
from nemo_dpo.launch import Ranks, present_ranks
from nemo_dpo.training.run_log import METRICS_FILE, read_metrics
from tests.cli.launch_support import SCRIPT, Inputs, ended, error_line, losses, make_inputs, start, train
from tests.support.cli import run_cli

PATCHES = "tests.cli.broken_host"
HEAVY = {"torch", "megatron", "lightning", "nemo", "transformers"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="session")
def two_ranks(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the quick run on two ranks; however they are started they must be these, bit for bit."""
    run = run_cli([*inputs.arguments, "trainer.devices=2"], tmp_path_factory.mktemp("two_ranks"))
    return losses(run.log_dir)


# --- refusals that cost no import -------------------------------------------------------------------------------------


def test_a_mistyped_key_is_refused_without_heavy_imports(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", SCRIPT, "++model.global_batch_sise=4"]
    run = ended(start(command, tmp_path))
    assert run.status == 2
    assert "did you mean model.global_batch_size?" in error_line(run.output)
    imported = {row.rpartition("|")[2].strip().partition(".")[0] for row in run.output.splitlines() if "|" in row}
    assert "omegaconf" in imported, "the list of imports was not read"
    assert imported & HEAVY == set()
    assert list(tmp_path.iterdir()) == [], "hydra's folders"


def test_the_bare_command_names_what_is_missing() -> None:
    command = [sys.executable, "train_gpt_dpo.py", "++model.dpo.ref_policy_kl_penalty=0.1"]
    run = ended(start(command, SCRIPT.parent))
    assert run.status == 2
    assert run.output.splitlines() == [error_line(run.output)], "one line"
    for part in ("a checkpoint", "pretrained_checkpoint.restore_from_path=", "preference pairs", "data_prefix="):
        assert part in run.output


# --- true launches ----------------------------------------------------------------------------------------------------


def test_one_process_from_another_folder_with_relative_paths(inputs: Inputs, tmp_path: Path) -> None:
    for path in (inputs.nemo, inputs.train, inputs.valid):
        (tmp_path / path.name).symlink_to(path)
    relative = Inputs(*(Path(path.name) for path in (inputs.nemo, inputs.train, inputs.valid)))
    options = ["exp_manager.explicit_log_dir=out", "model.optim.name=fused_adam", "trainer.dpo.max_steps=2"]
    run = train([*relative.arguments, *options], tmp_path)
    assert run.status == 0, run.output
    assert (tmp_path / "out" / "checkpoints" / "megatron_gpt.nemo").is_file()
    assert len(losses(tmp_path / "out")) == 2
    assert run.output.count("model.optim.name=fused_adam: a fused kernel is used") == 1, run.output
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tiny.nemo", "train.jsonl", "valid.jsonl"}


def test_the_guides_command_starts_its_ranks(inputs: Inputs, tmp_path: Path) -> None:
    """As the guide writes it, with 2 devices for 8 and smaller batches; bf16, TensorBoard and the plot by default."""
    files = f"train: [{inputs.train}], validation: [{inputs.valid}], test: [{inputs.valid}]"
    arguments = [
        "trainer.num_nodes=1",
        "trainer.devices=2",
        "++model.micro_batch_size=1",
        "++model.global_batch_size=8",
        *inputs.start,
        f"model.data.data_prefix={{{files}}}",
        "exp_manager.create_wandb_logger=false",
        "exp_manager.wandb_logger_kwargs.project=dpo_training",
        "exp_manager.wandb_logger_kwargs.name=dpo_training",
        f"exp_manager.explicit_log_dir={tmp_path / 'results'}",
        "++trainer.dpo.max_epochs=1",
        "++model.dpo.ref_policy_kl_penalty=0.1",
    ]
    run = train(arguments, tmp_path)
    assert run.status == 0, run.output
    assert "Layout(world=2" in run.output
    assert run.output.count("24 pairs, ") == 1, "rank 0 alone reports"
    rows = read_metrics(tmp_path / "results" / METRICS_FILE)
    assert [row["step"] for row in rows if "train/loss" in row] == [0, 1, 2]
    assert [row["step"] for row in rows if "test/loss" in row] == [3]
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"checkpoints", "data_cache", "logs", "metrics.jsonl", "metrics.png", "run"} <= names


def test_torchrun(inputs: Inputs, two_ranks: dict[int, float], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["trainer.devices=2", "exp_manager.explicit_log_dir=out"]
    run = ended(start([*torchrun, SCRIPT, *inputs.arguments, *options], tmp_path))
    assert run.status == 0, run.output
    assert losses(tmp_path / "out") == two_ranks


def test_srun(inputs: Inputs, two_ranks: dict[int, float], tmp_path: Path) -> None:
    """Two tasks of one node, with the variables that srun gives them."""
    command = [sys.executable, SCRIPT, *inputs.arguments, "trainer.devices=2", "exp_manager.explicit_log_dir=out"]
    shared = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        start(command, tmp_path, {**shared, "SLURM_PROCID": n, "SLURM_LOCALID": n, "MASTER_ADDR": "127.0.0.1"})
        for n in ("0", "1")
    ]
    runs = [ended(task) for task in tasks]
    assert [run.status for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert losses(tmp_path / "out") == two_ranks
    assert "24 pairs, " in runs[0].output
    assert "24 pairs, " not in runs[1].output


# 90 steps: time enough to be stopped in the middle.
LONG = ["trainer.devices=2", "model.global_batch_size=4", "trainer.dpo.max_epochs=15", "trainer.dpo.save_interval=10"]
LONG += ["trainer.dpo.val_check_interval=1.0", "exp_manager.checkpoint_callback_params.save_top_k=0"]


def test_a_killed_parent_takes_its_ranks_along_and_sigterm_saves(inputs: Inputs, tmp_path: Path) -> None:
    """Killed after step 12, asked to stop later, finished by the third start: the losses of an uninterrupted run."""
    whole = losses(run_cli([*inputs.arguments, *LONG], tmp_path / "whole").log_dir)
    assert len(whole) == 90
    log_dir = tmp_path / "log"
    command = [sys.executable, SCRIPT, *inputs.arguments, *LONG, f"exp_manager.explicit_log_dir={log_dir}"]

    first = start(command, tmp_path)
    wait_until(lambda: last_step(log_dir) >= 12, first)
    ranks = children(first.pid)
    assert len(ranks) == 2
    first.kill()
    first.communicate(timeout=60)  # its pipe is closed when the last rank has ended
    assert [rank for rank in ranks if alive(rank)] == []

    second = start(command, tmp_path)
    wait_until(lambda: last_step(log_dir) >= 30, second)
    second.terminate()
    stopped = ended(second)
    assert stopped.status == 0, stopped.output
    assert "resuming from" in stopped.output
    assert ": SIGTERM" in stopped.output
    saved = max(folders.read_progress(path)["step"] for path in folders.complete_checkpoints(log_dir / "checkpoints"))
    assert 30 <= saved < 90
    assert not (log_dir / "checkpoints" / "megatron_gpt.nemo").exists()

    run_cli([*inputs.arguments, *LONG], log_dir)
    assert losses(log_dir) == whole
    assert (log_dir / "checkpoints" / "megatron_gpt.nemo").exists()


def last_step(log_dir: Path) -> int:
    path = log_dir / METRICS_FILE
    return max((row["step"] for row in read_metrics(path)), default=-1) if path.exists() else -1


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "no progress"
        time.sleep(0.02)


# --- other ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_ends_at_once(inputs: Inputs, tmp_path: Path, ranks: int) -> None:
    arguments = [*inputs.arguments, f"trainer.devices={ranks}"]
    run = run_cli(arguments, tmp_path, check=False, patches=[f"{PATCHES}:interrupt_in_step_two"])
    assert run.status == 130, run.output
    assert error_line(run.output) == "error: interrupted; a new start goes on from the last checkpoint"


def test_a_rank_that_does_not_end_is_killed_after_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    sleeper = subprocess.Popen(["sleep", "60"])
    failing = subprocess.Popen(["sh", "-c", "exit 7"])
    begin = time.monotonic()
    assert launch._wait({sleeper.pid: 0, failing.pid: 1}) == 7
    assert time.monotonic() - begin < 10
    assert not Path(f"/proc/{sleeper.pid}").exists()
    sleeper.returncode, failing.returncode = -signal.SIGKILL, 7  # reaped above


# --- who is a rank ----------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (TORCHRUN, Ranks(5, 8, 1, 4)),
        (SRUN, Ranks(5, 8, 1, 4)),
        ({**SRUN, **TORCHRUN, "RANK": "6"}, Ranks(6, 8, 1, 4)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),  # in a batch script, outside srun
    ],
    ids=["none", "torchrun", "srun", "torchrun in a task", "one task", "batch script"],
)
def test_present_ranks(env: dict[str, str], expected: Ranks | None) -> None:
    assert present_ranks(env) == expected


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK"])
def test_a_rank_that_is_no_number(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='x' in the environment is not the number"):
        present_ranks({**TORCHRUN, name: "x"})


def config(**trainer: Any) -> Config:
    return Config(trainer=TrainerConfig(**trainer))


def test_ranks_against_the_configuration() -> None:
    two = Ranks(0, 2, 0, 2)
    assert launch.check_ranks(config(), two, 1) == 2, "auto takes the ranks that are there"
    assert launch.check_ranks(config(devices=2), two, 2) == 2
    assert launch.check_ranks(config(devices=1, num_nodes=2), two, 1) == 2
    assert launch.check_ranks(config(devices=3), None, 3) == 3
    with pytest.raises(ConfigError, match="is 1 ranks, but 2 were started"):
        launch.check_ranks(config(devices=1), two, 1)
    with pytest.raises(ConfigError, match="started alone; start one process per rank with srun or torchrun"):
        launch.check_ranks(config(num_nodes=2), None, 1)


def test_devices_of_a_host() -> None:
    assert launch.local_devices(config(), 0) == 1
    assert launch.local_devices(config(), 4) == 4
    assert launch.local_devices(config(devices=3), 0) == 3
    with pytest.raises(ConfigError, match=r"trainer\.devices=3 but this host has 2 accelerators; use at most 2"):
        launch.local_devices(config(devices=3), 2)


GPUS = "GPU-8e6f2d1a-1b2c-4d5e-8f90-aabbccddeeff", "GPU-2e6f2d1a-2b2c-4d5e-8f90-aabbccddeeff"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("0, 1", 2),
        ("1,-1,0", 1),
        ("1,,0", 1),
        (",".join(GPUS), 2),
        (f"{GPUS[0]},-1,{GPUS[1]}", 1),
    ],
)
def test_accelerators_are_counted_as_cuda_does(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: int
) -> None:
    monkeypatch.setattr(launch.os, "listdir", lambda _: ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.accelerators() == expected


def test_what_has_not_been_run_asks_for_permission() -> None:
    launch.check_host(config(), found=0)
    with pytest.raises(ConfigError, match="training on an accelerator has not been run yet"):
        launch.check_host(config(), found=1)
    launch.check_host(replace(config(), allow_unverified=True), found=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this host's GPUs")
@pytest.mark.parametrize("accelerator", ["gpu", "auto"])
def test_gpus_that_torch_cannot_use(inputs: Inputs, tmp_path: Path, accelerator: str) -> None:
    """Asked for by name they are an error; else a run says why it is on the CPU, once."""
    arguments = [*inputs.arguments, f"trainer.accelerator={accelerator}", "allow_unverified=true"]
    options = ["trainer.dpo.max_steps=1", "exp_manager.create_checkpoint_callback=false"]
    patches = ["tests.cli.launch_support:pretend_gpus"]
    run = run_cli([*arguments, *options], tmp_path, check=False, patches=patches)
    cause = f"this host has 2 NVIDIA devices but torch {torch.__version__} cannot use them (Torch not compiled"
    if accelerator == "gpu":
        assert run.status == 2
        # Here all is imported and a rank may be gone before the other starts, so the line may stand twice.
        (line,) = set(run.output.splitlines())
        assert line.startswith(f"error: trainer.accelerator=gpu: {cause}")
    else:
        assert run.status == 0, run.output
        assert run.output.count(cause) == 1, run.output
        assert "running on the CPU" in run.output
        assert "Layout(world=2" in run.output


def test_ranks_meet_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_PORT", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", *TORCHRUN, "GROUP_RANK"):
        monkeypatch.setenv(name, "")  # so that what _export writes is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    with pytest.raises(ConfigError, match="MASTER_PORT is not set and there is no Slurm job"):
        launch._export(Ranks(5, 8, 1, 4))
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    launch._export(Ranks(5, 8, 1, 4))
    assert {name: os.environ[name] for name in TORCHRUN} == TORCHRUN
    assert os.environ["GROUP_RANK"] == "1"
    assert os.environ["MASTER_ADDR"] == "node1"
    assert int(os.environ["MASTER_PORT"]) == 20000 + 12345670 % 10000


# --- null is what the checkpoint says ---------------------------------------------------------------------------------


def test_a_vocabulary_that_is_left_to_the_tokenizer(inputs: Inputs, tmp_path: Path) -> None:
    """As in an archive that NeMo itself has written: no vocab_size in the config."""
    folder = tmp_path / "extracted"
    archive.extract(inputs.nemo, folder)
    config = archive.read_model_config(folder)
    del config["vocab_size"]
    archive.write_model_config(config, folder)
    first, second = (
        run_cli([*replace(inputs, nemo=nemo).arguments, "trainer.dpo.max_steps=2"], tmp_path / name)
        for name, nemo in (("stated", inputs.nemo), ("left", folder))
    )
    assert losses(first.log_dir) == losses(second.log_dir)


def test_another_layout_of_the_checkpoint_is_named(inputs: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "extracted"
    archive.extract(inputs.nemo, folder)
    archive.write_model_config({**archive.read_model_config(folder), "tensor_model_parallel_size": 8}, folder)
    run = run_cli([*replace(inputs, nemo=folder).arguments, "trainer.devices=2", "trainer.dpo.max_steps=1"], tmp_path)
    assert run.output.count("layout: the checkpoint's configuration has tensor_model_parallel_size=8; this run") == 1


FULL = {
    "activations_checkpoint_granularity": "full",
    "activations_checkpoint_method": "uniform",
    "activations_checkpoint_num_layers": 2,
}


@pytest.mark.parametrize(
    ("own", "held", "expected"),
    [
        ({}, {}, (None, None, None)),
        ({}, FULL, ("full", "uniform", 2)),
        ({"activations_checkpoint_granularity": "none"}, FULL, (None, None, None)),
        ({"activations_checkpoint_granularity": "selective"}, FULL, ("selective", None, None)),
        ({"activations_checkpoint_num_layers": 1}, FULL, ("full", "uniform", 1)),
        (FULL, {}, ("full", "uniform", 2)),
        ({}, {"activations_checkpoint_granularity": None}, (None, None, None)),
    ],
)
def test_recompute_is_the_checkpoints_unless_given(own: dict[str, Any], held: dict[str, Any], expected: Any) -> None:
    from nemo_dpo.training.policy import recompute_options

    assert recompute_options(Config(model=ModelConfig(**own)), held) == expected
