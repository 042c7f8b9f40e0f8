"""Patches for `run_cli`, called in the process before the command: what goes wrong with a host or during a run."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import math
import os
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_dpo import launch
from nemo_dpo.checkpoint import folders, writing
from nemo_dpo.data import DataError
from nemo_dpo.parallel import watch


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _at_call(count: int, function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """`function`, but its call number `count` ends with `act`, before the caller learns that it is done."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == count:
            act()
        return result

    return wrapped


def kill_after_the_shards() -> None:
    """The second checkpoint has its shards, and not yet its progress.json."""
    writing._write = _at_call(2, writing._write, _die)


def kill_before_the_rename() -> None:
    """The second checkpoint is complete, and not yet under its final name."""
    writing.manifest.write = _at_call(2, writing.manifest.write, _die)


def kill_while_pruning() -> None:
    """The second checkpoint is there, the first one about to be deleted."""
    folders.shutil = SimpleNamespace(rmtree=_die, disk_usage=shutil.disk_usage)  # type: ignore[attr-defined]


def kill_while_packing() -> None:
    """The trained .nemo is half written."""
    tarfile.TarFile.add = _at_call(3, tarfile.TarFile.add, _die)  # type: ignore[method-assign]


def kill_while_packing_an_adapter() -> None:
    """As above; it consists of two files."""
    tarfile.TarFile.add = _at_call(2, tarfile.TarFile.add, _die)  # type: ignore[method-assign]


def fill_disk_while_saving() -> None:
    """The second checkpoint finds no room for its last bytes."""
    writing._write = _at_call(2, writing._write, _full)


def fill_disk_while_packing() -> None:
    """The trained .nemo finds no room."""
    tarfile.TarFile.add = _at_call(3, tarfile.TarFile.add, _full)  # type: ignore[method-assign]


def kill_rank_one() -> None:
    """Rank 1 is killed in its second step, as by the kernel's out-of-memory killer."""
    from nemo_dpo.training.module import PreferenceModule

    _kill_rank_one_in_step(PreferenceModule)


def _kill_rank_one_in_step(module: Any) -> None:
    step = module.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and os.environ["RANK"] == "1":
            _die()
        step(self, batch, batch_idx)

    module.training_step = training_step


def refuse_on_rank_one() -> None:
    """Rank 1 alone finds its data gone in its second step, and the other is not waited for."""
    from nemo_dpo.training.module import PreferenceModule

    launch.GRACE_SECONDS = 1.0
    step = PreferenceModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and os.environ["RANK"] == "1":
            raise DataError("the cache is gone")
        step(self, batch, batch_idx)

    PreferenceModule.training_step = training_step  # type: ignore[method-assign]


def break_a_gradient() -> None:
    """The second step has a finite loss and an infinite gradient."""
    from nemo_dpo.parallel.engine import Engine

    run, steps = Engine.forward_backward, itertools.count(1)

    def forward_backward(self: Any, *args: Any) -> Any:
        sums = run(self, *args)
        if next(steps) == 2:
            next(self.chunks[0].parameters()).main_grad.fill_(math.inf)
        return sums

    Engine.forward_backward = forward_backward  # type: ignore[method-assign]


def interrupt_in_step_two() -> None:
    """Ctrl-C in the third step."""
    from nemo_dpo.training.module import PreferenceModule

    step = PreferenceModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, batch, batch_idx)

    PreferenceModule.training_step = training_step  # type: ignore[method-assign]


def no_ftfy() -> None:
    """ftfy is not installed."""
    find_spec = importlib.util.find_spec
    launch.importlib.util.find_spec = lambda name, package=None: (  # type: ignore[attr-defined]
        None if name == "ftfy" else find_spec(name, package)
    )


def one_accelerator() -> None:
    """The host has one GPU."""
    launch.accelerators = lambda: 1


def no_wandb_account() -> None:
    """Nobody has logged in to Weights & Biases here."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        os.environ.pop(name, None)
    os.environ.update(NETRC=os.devnull, WANDB_CONFIG_DIR=os.devnull)


def two_ranks_started() -> None:
    """torchrun started two ranks; this is the first."""
    os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")


def half_a_torchrun() -> None:
    """A job system sets RANK and WORLD_SIZE but not LOCAL_RANK."""
    os.environ.update(RANK="0", WORLD_SIZE="2")
    os.environ.pop("LOCAL_RANK", None)


def _in_second_step(rank: int, act: Callable[[], object]) -> None:
    """`act` on one rank, where its second step begins."""
    from nemo_dpo.training.module import PreferenceModule

    step = PreferenceModule._train

    def train(self: Any, batch: Any, number: int) -> None:
        if number == 1 and os.environ["RANK"] == str(rank):
            act()
        step(self, batch, number)

    PreferenceModule._train = train  # type: ignore[method-assign]
    launch.GRACE_SECONDS = 1.0
    answer_soon()


def answer_soon() -> None:
    """Ranks wait for each other's answers for four seconds only."""
    watch.ANSWER_SECONDS = 4.0


def stop_rank_one() -> None:
    """Rank 1 is stopped, and not ended: its connections stay open."""
    _in_second_step(1, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def stop_rank_zero() -> None:
    """Rank 0, which holds the store at which the ranks met, is stopped."""
    _in_second_step(0, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def fall_asleep() -> None:
    """Rank 1 hangs in a call of its own, as on a file system that does not answer."""
    _in_second_step(1, lambda: time.sleep(600))


def fall_asleep_in_a_save() -> None:
    """The same when it saves."""
    from nemo_dpo.checkpoint import sharded

    save = sharded.save

    def slow(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(600)
        return save(*args, **kwargs)

    sharded.save = slow
    launch.GRACE_SECONDS = 1.0
    answer_soon()


# Put together here: NeMo keeps the repository's uncommitted changes in the log folder, this file perhaps among them.
SECRETS = {name: "5ecre7" * 7 + name[:3] for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}


def account_at_a_server() -> None:
    """A key, and secrets of other programs, in the environment; the server is the one named in the log folder."""
    from nemo_dpo.training import wandb_log
    from tests.cli.probes import log_dir

    for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        os.environ.pop(name, None)
    url = (log_dir() / "server.txt").read_text()
    os.environ.update(SECRETS, NETRC=os.devnull, WANDB_BASE_URL=url, WANDB_FINISH_TIMEOUT="2")
    wandb_log.REACH_SECONDS = 1.0


def kill_wandb() -> None:
    """wandb's own process is killed before the second step."""
    _in_second_step(0, _kill_wandb_core)


def _kill_wandb_core() -> None:
    for child in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().startswith("wandb"):
            os.kill(int(child), signal.SIGKILL)


def umask_022() -> None:
    """Others may read."""
    os.umask(0o022)


def umask_077() -> None:
    """Nobody else may read."""
    os.umask(0o077)
