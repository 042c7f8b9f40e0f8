"""Where a run writes: its folder, its loggers, metrics.jsonl and the progress bar."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from nemo_dpo.checkpoint import SaveError
from nemo_dpo.config import Config, to_yaml
from nemo_dpo.config.exp_manager import ExpManagerConfig, nemo_options
from nemo_dpo.training.resume import Place
from nemo_dpo.training.wandb_log import GuardedWandb, wandb_options

PACKAGES = ("torch", "megatron-core", "nemo_toolkit", "lightning", "transformers", "transformer-engine", "nemo_dpo")
METRICS_FILE = "metrics.jsonl"
REVISION = "NEMO_DPO_REVISION"  # set in the container image, which holds no git


def log_dir_of(cfg: ExpManagerConfig) -> Path:
    """explicit_log_dir, or NeMo's <exp_dir>/<name>[/<version>]: a run that may resume has no version of its own."""
    if cfg.explicit_log_dir is not None:
        return Path(cfg.explicit_log_dir).absolute()
    folder = Path(cfg.exp_dir or "nemo_experiments").absolute() / cfg.name
    if cfg.version is not None:
        return folder / cfg.version
    if cfg.resume_if_exists:
        return folder
    if cfg.use_datetime_version:
        return folder / time.strftime("%Y-%m-%d_%H-%M-%S")
    taken = [
        int(f.name.removeprefix("version_"))
        for f in folder.glob("version_*")
        if f.name.removeprefix("version_").isdigit()
    ]
    return folder / f"version_{max(taken, default=-1) + 1}"


def save_run_facts(cfg: Config, log_dir: Path) -> None:
    """The effective configuration, the git revision and the package versions, beside the checkpoints.

    A later start writes its own and keeps the earlier ones, the oldest as config_1.yaml and versions_1.json.
    """
    folder = log_dir / "run"
    folder.mkdir(parents=True, exist_ok=True)
    _write_beside_earlier(folder / "config.yaml", to_yaml(cfg))
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    facts = {"python": sys.version.split()[0], "git": _revision(), "packages": versions}
    _write_beside_earlier(folder / "versions.json", json.dumps(facts, indent=1) + "\n")


def _revision() -> str | None:
    """What the image was built from (the Dockerfile's REVISION), else the checkout that this is a part of."""
    if REVISION in os.environ:
        return os.environ[REVISION] or None
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:  # no git on this host
        return None


def _write_beside_earlier(path: Path, text: str) -> None:
    """What an earlier start wrote there stays, under another name, if it differs."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        _set_aside(path)
    path.write_text(text, encoding="utf-8")


def _set_aside(path: Path) -> None:
    """Rename to the first free of <stem>_1, <stem>_2 …"""
    names = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(1))
    path.rename(next(name for name in names if not name.exists()))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def attach_loggers(trainer: Trainer, cfg: ExpManagerConfig, log_dir: Path, place: Place) -> None:
    """NeMo's exp_manager makes the loggers that `cfg` asks for; metrics.jsonl is added to them.

    exp_manager's checkpoints, resuming and preemption stay off: they read the state of a run from file names.
    """
    from nemo.utils.exp_manager import exp_manager

    options = nemo_options(cfg)
    if cfg.create_wandb_logger:
        options["wandb_logger_kwargs"] = wandb_options(cfg, log_dir)
    # In a folder of its own: at each start exp_manager moves the files that it finds there to run_N.
    exp_manager(trainer, {**options, "explicit_log_dir": str(log_dir / "logs")})
    guarded = [
        GuardedWandb(target, options["wandb_logger_kwargs"]) if isinstance(target, WandbLogger) else target
        for target in trainer.loggers
    ]
    trainer.loggers = [*guarded, JsonlLogger(log_dir / METRICS_FILE, place)]


def close_loggers(trainer: Trainer) -> None:
    """After the last figure."""
    for target in trainer.loggers:
        if isinstance(target, GuardedWandb):
            target.close()


class JsonlLogger(Logger):
    """One JSON object a line: step and metrics.

    A resumed run first drops what the interrupted one wrote after its last save; a run that starts afresh sets the
    file of an earlier one aside, as metrics_1.jsonl.
    """

    def __init__(self, path: Path, place: Place) -> None:
        super().__init__()
        self._path = path
        if rank_zero_only.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            if place.step == 0 and path.exists():
                _set_aside(path)
            rows = [row for row in read_metrics(path) if _before(row, place)] if path.exists() else []
            fresh = path.with_name(f".{path.name}.new")  # a kill leaves the old rows or these
            fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(fresh, path)

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The effective configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line.

        Raises:
            SaveError: the disk is full, or gone.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise SaveError(
                f"{self._path}: cannot be written ({error.strerror}); make space and start again: the run resumes"
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _before(row: Mapping[str, Any], place: Place) -> bool:
    # A step's training metrics belong to the update that follows; validation at a step precedes the save at that step,
    # unless a stop has left it to the next start; the test split comes last and is evaluated again.
    if any(name.startswith("test/") for name in row):
        return False
    follows = any(name.startswith("train/") for name in row) or place.validation_due
    return bool(row["step"] < place.step if follows else row["step"] <= place.step)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over the whole run, with the numbers people look at."""

    SHOWN = ("loss", "acc", "pairs_per_second")

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 10)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """A resumed run begins where it was, and its speed is that of its own steps."""
        # Without Lightning's "Epoch 0": its one epoch holds all epochs of the run.
        self.train_progress_bar.reset(trainer.max_steps)
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """Count the run's steps: Lightning's number of the batch is one short after a resume."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Show the last step, also where a run stops between two refreshes."""
        self.train_progress_bar.n = trainer.global_step
        super().on_train_end()

    def on_exception(self, *_: Any) -> None:
        """End the bar's line: what is said next begins a new one."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # type: ignore[override]
        """loss, acc and pairs/s of the last step."""
        latest: dict[str, float] = pl_module.metrics  # type: ignore[assignment]
        return {name: f"{latest[name]:.3f}" for name in self.SHOWN if name in latest}
