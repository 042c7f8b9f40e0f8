"""From a command line to running ranks: everything that can be refused is refused here, before torch is imported.

On a host without the ranks of torchrun or srun the ranks are forked. On a CPU host that happens after the imports (they
cost seconds, once), with accelerators before them (a process that has touched CUDA must not fork).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.archive import read_model_config
from nemo_dpo.config import Config, ConfigError, check, check_layout, check_model, load_config, parse_cli, show_config
from nemo_dpo.data import DataError
from nemo_dpo.model.architecture import Architecture, ArchitectureError
from nemo_dpo.tokenizer import TokenizerError
from nemo_dpo.training import signals

REFUSALS = (ConfigError, DataError, CheckpointError, ArchitectureError, TokenizerError)
GRACE_SECONDS = 30.0  # for the other ranks to end by themselves after one has failed


@dataclass(frozen=True)
class Ranks:
    """The processes of a run that already exist, and this one's place among them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def main(config_dir: Path, config_name: str, job: str, argv: Sequence[str]) -> int:
    """Run `job` (a function of nemo_dpo.app) with the configuration that `argv` describes; returns the exit status.

    2 is a refused request (one line on stderr), 1 a run that failed, 0 one that ended or was asked to stop.
    """
    signals.note_signals()
    try:
        request = parse_cli(argv, config_dir, config_name, sys.argv[0])
        if request.show_config:
            show_config(request)
        cfg = load_config(request.config_dir, request.config_name, request.overrides)
        check(cfg)
        model_config = read_model_config(Path(str(cfg.pretrained_checkpoint.restore_from_path)))
        Architecture.parse(model_config)
        check_model(cfg, model_config)
        present = present_ranks(os.environ)
        devices = local_devices(cfg)
        world = check_ranks(cfg, present, devices)
        check_layout(cfg, world)
        if present is None and devices > 1:
            return _fork_ranks(devices, lambda: _run(job, cfg), preload=None if accelerators() else "nemo_dpo.app")
        _export(present or Ranks(0, 1, 0, 1))
        return _run(job, cfg)
    except REFUSALS as error:
        return _refuse(error)


def _refuse(error: Exception) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return 2


def _run(job: str, cfg: Config) -> int:
    app = importlib.import_module("nemo_dpo.app")
    return int(getattr(app, job)(cfg))


def present_ranks(env: Mapping[str, str]) -> Ranks | None:
    """The ranks that torchrun or srun has started, or None. One lone srun task counts as none."""
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return Ranks(int(env["RANK"]), world, int(env["LOCAL_RANK"]), int(env.get("LOCAL_WORLD_SIZE", world)))
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        world, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
        return Ranks(int(env["SLURM_PROCID"]), world, int(env["SLURM_LOCALID"]), world // nodes)
    return None


def accelerators() -> int:
    """NVIDIA devices that this process may use, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])
    return present if visible is None else min(present, len([part for part in visible.split(",") if part.strip()]))


def local_devices(cfg: Config) -> int:
    """Ranks wanted on this host."""
    if cfg.trainer.accelerator == "gpu" and not accelerators():
        raise ConfigError(
            "trainer.accelerator=gpu but this host has no NVIDIA device; use trainer.accelerator=auto or cpu"
        )
    found = 0 if cfg.trainer.accelerator == "cpu" else accelerators()
    if cfg.trainer.devices == "auto":
        return max(1, found)
    devices = int(cfg.trainer.devices)
    if found and devices > found:
        raise ConfigError(
            f"trainer.devices={devices} but this host has {found} accelerators; use at most {found}, or trainer.accelerator=cpu"
        )
    return devices


def check_ranks(cfg: Config, present: Ranks | None, devices: int) -> int:
    """All ranks of the run; ConfigError if those that exist are not those that the configuration names."""
    if present is None:
        if cfg.trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={cfg.trainer.num_nodes} but this process was started alone; start one process per rank with srun or torchrun"
            )
        return devices
    wanted = devices * cfg.trainer.num_nodes
    if cfg.trainer.devices != "auto" and wanted != present.world_size:
        raise ConfigError(
            f"trainer.devices={devices} × trainer.num_nodes={cfg.trainer.num_nodes} is {wanted} ranks, but {present.world_size} were started; "
            "make the two agree"
        )
    return present.world_size


def _export(ranks: Ranks) -> None:
    """The environment that torch.distributed and Lightning read, as torchrun would set it."""
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
        GROUP_RANK=str(ranks.rank // ranks.local_world_size),
    )
    os.environ.setdefault("TORCHELASTIC_RUN_ID", "nemo_dpo")
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = (
            _first_host(os.environ.get("SLURM_STEP_NODELIST")) if ranks.world_size > 1 else "127.0.0.1"
        )
    if "MASTER_PORT" not in os.environ:
        job = os.environ.get("SLURM_JOB_ID")
        os.environ["MASTER_PORT"] = str(15000 + int(job) % 20000 if job and ranks.world_size > 1 else _free_port())


def _first_host(nodes: str | None) -> str:
    if nodes is None:
        raise ConfigError("MASTER_ADDR is not set and there is no Slurm node list; export MASTER_ADDR on every rank")
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return str(SLURMEnvironment.resolve_root_node_address(nodes))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork_ranks(count: int, run: Callable[[], int], preload: str | None) -> int:
    """Run `run` in `count` children that are ranks of one run; returns the worst exit status."""
    if preload:
        importlib.import_module(preload)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    sys.stdout.flush()
    sys.stderr.flush()
    children = [_fork(Ranks(rank, count, rank, count), run) for rank in range(count)]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, _frame: _signal_all(children, received))
    return _wait(children)


def _fork(ranks: Ranks, run: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signals.note_signals()
        _export(ranks)
        status = run()
    except REFUSALS as error:
        status = _refuse(error)
    except BaseException:
        import traceback

        sys.stderr.write(f"rank {ranks.rank}: {traceback.format_exc()}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the parent's exit handlers are not this process's


def _wait(children: list[int]) -> int:
    statuses: list[int] = []
    deadline = None
    while len(statuses) < len(children):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses.append(os.waitstatus_to_exitcode(status))
            if statuses[-1] and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
            continue
        if deadline is not None and time.monotonic() > deadline:
            _signal_all(children, signal.SIGKILL)
        time.sleep(0.02)
    failed = [status for status in statuses if status]
    return abs(failed[0]) if failed else 0


def _signal_all(children: list[int], number: int) -> None:
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
