"""A tiny model and pairs for tests that start commands, and what is asked of a command's output."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_dpo.convert import hf_to_nemo
from nemo_dpo.training.run_log import METRICS_FILE, read_metrics
from tests.support.tiny import write_hf_model, write_pairs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "nlp" / "gpt" / "train_gpt_dpo.py"
# fp32, no warm-up, a rate at which the loss moves: 3 steps of 8 pairs.
QUICK = (
    "trainer.precision=32",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
    "model.optim.lr=0.002",
    "model.optim.sched.warmup_steps=0",
    "model.optim.sched.constant_steps=0",
    "model.optim.sched.min_lr=0.0001",
    "exp_manager.plot_on_train_end=false",
    "exp_manager.create_tensorboard_logger=false",
)


@dataclass(frozen=True)
class Inputs:
    """What every command needs."""

    nemo: Path
    train: Path
    valid: Path

    @property
    def arguments(self) -> list[str]:
        """Checkpoint, data and the quick settings, as overrides."""
        return [*self.start, data(self.train, self.valid), *QUICK]

    @property
    def start(self) -> list[str]:
        """The checkpoint, as an override."""
        return [f"pretrained_checkpoint.restore_from_path={self.nemo}"]


def data(train: Path, valid: Path) -> str:
    """The override that names the files."""
    return f"model.data.data_prefix={{train: ['{train}'], validation: ['{valid}']}}"


def make_inputs(folder: Path) -> Inputs:
    """24 training and 8 validation pairs, and a model of 4 layers and 4 heads (2 key/value groups)."""
    hf = write_hf_model(folder / "hf")
    hf_to_nemo(hf, folder / "tiny.nemo", precision="32")
    return Inputs(
        folder / "tiny.nemo",
        write_pairs(folder / "train.jsonl", 24),
        write_pairs(folder / "valid.jsonl", 8, seed=1),
    )


@dataclass(frozen=True)
class Ended:
    """What a process did."""

    status: int
    output: str


def start(
    command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A process in a session of its own, with this repository's package and none of the caller's rank variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "TORCHELASTIC_", "WANDB_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **own},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], timeout: float = 200) -> Ended:
    """Wait for the end."""
    output, _ = process.communicate(timeout=timeout)
    return Ended(process.returncode, output)


def train(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """The training script as a user starts it."""
    return ended(start([sys.executable, "-u", SCRIPT, *arguments], cwd, environment))


def losses(log_dir: Path) -> dict[int, float]:
    """Training loss by step; a step that stands twice fails."""
    rows = [row for row in read_metrics(log_dir / METRICS_FILE) if "train/loss" in row]
    by_step = {row["step"]: row["train/loss"] for row in rows}
    assert len(by_step) == len(rows), [row["step"] for row in rows]
    return by_step


def error_line(output: str) -> str:
    """The one error of an output; more than one, or a traceback, fails."""
    assert "Traceback" not in output, output
    # One rank may write it behind the bar of another.
    rows = [line[line.find("error: ") :] if line.startswith("Training:") else line for line in output.splitlines()]
    lines = [row for row in rows if row.startswith("error: ")]
    assert len(lines) == 1, output
    return lines[0]


def pretend_gpus() -> None:
    """For `run_cli(patches=…)`: device files of two GPUs, which the CPU build of torch cannot use."""
    from nemo_dpo import launch

    launch.accelerators = lambda: 2
