"""Functions for `run_cli(patches=…)` that ask a run to stop at a certain moment, and say where it would be requeued."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

from nemo_dpo.training.leave import REQUEUE_FILE
from tests.cli.probes import log_dir, wrap


def can_be_requeued() -> None:
    """As under slurm/common.sh: the results folder gets the file."""
    os.environ[REQUEUE_FILE] = str(log_dir() / "requeue")


def of_a_slurm_job() -> None:
    """As under Slurm, which ends the job when it waits for that: with a second SIGTERM."""
    can_be_requeued()
    os.environ["SLURM_JOB_ID"] = "1"
    wrap(signal, "pause", lambda pause: os.kill(os.getpid(), signal.SIGTERM))


def of_job_seven() -> None:
    """In its first start."""
    can_be_requeued()
    os.environ["SLURM_JOB_ID"] = "7"


def of_job_seven_again() -> None:
    """As Slurm starts a requeued job."""
    of_job_seven()
    os.environ["SLURM_RESTART_COUNT"] = "1"


def _signal_at(owner: Any, name: str, *numbers: int) -> None:
    """The first call of the function is interrupted by signals, and goes on."""
    sent: list[int] = []

    def interrupted(function: Any, *args: Any, **kwargs: Any) -> Any:
        for number in numbers if not sent else ():
            os.kill(os.getpid(), number)
            sent.append(number)
        return function(*args, **kwargs)

    wrap(owner, name, interrupted)


def while_tokenising() -> None:
    from nemo_dpo.data import dataset

    _signal_at(dataset, "tokenize_pairs", signal.SIGUSR1)


def while_building() -> None:
    from nemo_dpo import app

    _signal_at(app, "build_engine", signal.SIGUSR1)


def in_the_first_validation() -> None:
    """Of the untouched policy."""
    _in_batch("validation", 1)


def while_validating() -> None:
    """After step 1; there are two batches."""
    _in_batch("validation", 3)


def in_the_last_validation() -> None:
    """After step 3."""
    _in_batch("validation", 7)


def while_testing() -> None:
    """The first batch of two."""
    _in_batch("test", 1)


def _in_batch(split: str, number: int) -> None:
    """Of all of that split that are evaluated; the last rank alone is asked."""
    from nemo_dpo.training.data import Batches

    batches = itertools.count(1)

    def get(function: Any, batch: Any, index: int) -> Any:
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if last and batch.split == split and next(batches) == number:
            os.kill(os.getpid(), signal.SIGUSR1)
        return function(batch, index)

    wrap(Batches, "__getitem__", get)


def in_the_first_step() -> None:
    from nemo_dpo.training.module import PreferenceModule

    _signal_at(PreferenceModule, "training_step", signal.SIGUSR1)


def killed_in_the_first_step() -> None:
    from nemo_dpo.training.module import PreferenceModule

    _signal_at(PreferenceModule, "training_step", signal.SIGKILL)


def terminated_in_the_first_step() -> None:
    from nemo_dpo.training.module import PreferenceModule

    _signal_at(PreferenceModule, "training_step", signal.SIGTERM)


def terminated_with_all_children() -> None:
    """As by Slurm, whose signals reach wandb's own process, too."""
    from nemo_dpo.training.module import PreferenceModule

    def step(train: Any, *args: Any) -> Any:
        numbers = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for pid in (*map(int, numbers), os.getpid()):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)  # until it has ended
        return train(*args)

    wrap(PreferenceModule, "training_step", step)


def once_more_while_saving() -> None:
    from nemo_dpo.checkpoint import sharded

    in_the_first_step()
    _signal_at(sharded, "save", signal.SIGUSR1, signal.SIGUSR1)


def terminated_while_saving() -> None:
    from nemo_dpo.checkpoint import sharded

    in_the_first_step()
    _signal_at(sharded, "save", signal.SIGTERM)


def while_exporting() -> None:
    from nemo_dpo import app

    _signal_at(app, "finish", signal.SIGUSR1, signal.SIGTERM)


def never_asked() -> None:
    """No signal."""
