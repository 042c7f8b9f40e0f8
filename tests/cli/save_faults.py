"""Patches for `run_cli`: what happens to the checkpoint of step 4 while it is written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_dpo.data import DataError
from tests.cli.probes import log_dir, wrap


def _at_step_4(act: Callable[[], object]) -> None:
    from nemo_dpo.checkpoint import writing

    def write(run: Any, transforms: Any, buckets: Any, into: Path) -> Any:
        if into.name == "step=4.unfinished":
            act()
        return run(transforms, buckets, into)

    wrap(writing, "_write", write)


def _in_step(number: int, signal_number: int) -> None:
    """The step that begins after `number` updates sends this process a signal."""
    from nemo_dpo.training.module import PreferenceModule

    def train(step: Any, module: Any, batch: Any, batch_number: int) -> None:
        if module.trainer.global_step == number:
            os.kill(os.getpid(), signal_number)
        step(module, batch, batch_number)

    wrap(PreferenceModule, "training_step", train)


def slow_while_it_is_written() -> None:
    """It takes until two steps later; went_on.json holds how many steps had begun then."""
    from nemo_dpo.training.module import PreferenceModule

    def wait() -> None:
        while not (log_dir() / "went_on.json").exists():
            time.sleep(0.01)

    def train(step: Any, module: Any, batch: Any, batch_number: int) -> None:
        step(module, batch, batch_number)
        if module.trainer.global_step == 5:
            (log_dir() / "went_on.json").write_text("5")

    _at_step_4(wait)
    wrap(PreferenceModule, "training_step", train)


def compute_with_two_threads() -> None:
    """Whose pool exists when a save is forked, and is not in the fork."""
    import torch

    from nemo_dpo.checkpoint import writing

    def start(init: Any, *args: Any) -> None:
        torch.set_num_threads(2)
        torch.ones(10**7).sum()
        (log_dir() / "threads.json").write_text(str(torch.get_num_threads()))
        init(*args)

    wrap(writing._Fork, "__init__", start)


def _hang() -> None:
    (log_dir() / "writer.pid").write_text(str(os.getpid()))
    time.sleep(600)


def kill_while_it_is_written() -> None:
    """It is never finished; training goes on, and is killed in the step after the next."""
    _at_step_4(_hang)
    _in_step(5, signal.SIGKILL)


def stop_while_it_is_written() -> None:
    """It takes long; SIGTERM comes in the next step."""
    _at_step_4(lambda: time.sleep(2))
    _in_step(4, signal.SIGTERM)


def fail_while_it_is_written() -> None:
    """It takes long; the next step fails."""
    from nemo_dpo.training.module import PreferenceModule

    def train(step: Any, module: Any, batch: Any, batch_number: int) -> None:
        if module.trainer.global_step == 4:
            raise DataError("the cache is gone")
        step(module, batch, batch_number)

    _at_step_4(_hang)
    wrap(PreferenceModule, "training_step", train)


def no_finite_loss_while_it_is_written() -> None:
    """It takes long; the loss of the next step is not finite."""
    from nemo_dpo.training import module

    _at_step_4(lambda: time.sleep(2))
    finalize, calls = module.finalize, [0]

    def broken(sums: Any) -> Any:
        calls[0] += 1
        return {**finalize(sums), **({"loss": float("nan")} if calls[0] == 6 else {})}

    module.finalize = broken


def kill_its_writer() -> None:
    """As the kernel does when memory runs out."""
    _at_step_4(lambda: os.kill(os.getpid(), signal.SIGKILL))


def fill_the_disk() -> None:
    """There is no room for its tensors, which was not known before."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _at_step_4(full)


def eat_the_disk_while_tensors_are_written() -> None:
    """Another program leaves a megabyte for them."""
    _at_step_4(lambda: _eat(2**20))


def eat_the_disk_while_rank_zero_completes() -> None:
    """All ranks have written their tensors; there is no byte left for the index."""
    from nemo_dpo.checkpoint import writing

    def complete(run: Any, save: Any, shares: Any) -> Any:
        if save.folder.name == "step=4":
            _eat(0)
        return run(save, shares)

    wrap(writing.Writing, "_complete", complete)


def _eat(leave: int) -> None:
    """Fill the disk of the checkpoints up to `leave` bytes."""
    folder = log_dir() / "checkpoints"
    with (folder / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - leave))
