"""From a command line to running ranks: everything that can be refused is refused here, before torch is imported.

On a host without the ranks of torchrun or srun the ranks are forked. On a CPU host that happens after the imports (they
cost seconds, once), with accelerators before them (a process that has touched CUDA must not fork).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import itertools
import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_dpo.checkpoint import CheckpointError, SaveError
from nemo_dpo.checkpoint.archive import read_model_config
from nemo_dpo.config import (
    Config,
    ConfigError,
    check,
    check_folders,
    check_layout,
    check_model,
    layout_notice,
    load_config,
    parse_cli,
    show_config,
    with_cached_reference,
)
from nemo_dpo.data import DataError
from nemo_dpo.model.architecture import Architecture, ArchitectureError
from nemo_dpo.model.nemo_keys import completed
from nemo_dpo.parallel import RankLost
from nemo_dpo.parallel.processes import die_with
from nemo_dpo.tokenizer import TokenizerError
from nemo_dpo.training import signals
from nemo_dpo.training.board import Board

logger = logging.getLogger(__name__)

REFUSALS = (ConfigError, DataError, CheckpointError, ArchitectureError, TokenizerError)
HOST_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
GRACE_SECONDS = 30.0  # for the other ranks to end by themselves after one has failed

# What has never been run on an accelerator, and when a configuration uses it. docs/gpu.md has the table of runs.
UNVERIFIED: tuple[tuple[str, Callable[[Config], bool]], ...] = (("training on an accelerator", lambda cfg: True),)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run that already exist, and this one's place among them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def main(config_dir: Path, config_name: str, job: str, argv: Sequence[str]) -> int:
    """Run `job` (a function of nemo_dpo.app) with the configuration that `argv` describes; returns the exit status.

    0: it ended or was asked to stop; 1: it failed; 2: refused, with one line that says what to change; 130: Ctrl-C;
    128 + the signal: a rank was killed.
    """
    signals.note_signals()
    try:
        return _guarded(lambda: _launch(config_dir, config_name, job, argv))
    finally:
        signals.ignore_requests()


def _launch(config_dir: Path, config_name: str, job: str, argv: Sequence[str]) -> int:
    present = present_ranks(os.environ)
    _set_up_logging(present.rank if present else 0)
    request = parse_cli(argv, config_dir, config_name, sys.argv[0])
    cfg = load_config(request.config_dir, request.config_name, request.overrides)
    if job == "cache_reference":  # takes a training's own configuration
        cfg = with_cached_reference(cfg)
    if request.show_config:
        show_config(cfg)
    check(cfg)
    if cfg.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch must not see what is not to be used
    check_host(cfg, accelerators())
    check_folders(cfg)
    world = check_ranks(cfg, present, local_devices(cfg, accelerators()))
    check_layout(cfg, world)
    model_config = read_model_config(Path(str(cfg.pretrained_checkpoint.restore_from_path)))
    # Where the vocabulary's size is left to the tokenizer, which is not read yet, any size will do here.
    Architecture.parse(model_config, tokenizer_vocab_size=1)
    check_model(cfg, completed(model_config))
    if notice := layout_notice(cfg, model_config):
        logger.info("%s", notice)
    if present is None and world > 1:
        return _fork_ranks(world, lambda: _run(job, cfg), preload=None if accelerators() else "nemo_dpo.app")
    _export(present or _alone(0, 1))
    return _as_rank(lambda: _run(job, cfg)) if present else _run(job, cfg)


def _run(job: str, cfg: Config) -> int:
    if cfg.model.deterministic:
        _ask_for_determinism()
    app = importlib.import_module("nemo_dpo.app")
    check_torch(cfg, accelerators())
    return int(getattr(app, job)(cfg))


def _ask_for_determinism() -> None:
    # Transformer Engine and cuBLAS read these when they are loaded; what the user has set is left alone.
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _as_rank(run: Callable[[], int]) -> int:
    """`run` as one of the ranks of this host, which have the same parent: what several of them report is said once."""
    with Board(f"{os.getppid()}_{os.environ['MASTER_PORT']}") as board:
        return _guarded(run, board.is_news)


def _first_of_host(_text: str) -> bool:
    # Before the run the ranks of one host read the same configuration and files, and refuse them alike.
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def _guarded(run: Callable[[], int], speaks: Callable[[str], bool] = _first_of_host) -> int:
    """The exit status of `run`. A failure that one line explains costs one line; any other keeps its traceback.

    Args:
        speaks: whether this process is the one to write a text.
    """
    try:
        return run()
    except (SaveError, RankLost) as error:
        text, status = str(error), 1
    except REFUSALS as error:
        text, status = str(error), 2
    except FloatingPointError as error:
        text, status = f"{error}. Look at the data of this step or lower model.optim.lr; a new start resumes", 1
    except OSError as error:
        if error.errno not in HOST_FAULTS:
            raise
        text, status = str(error), 1
    except signals.Interrupted:
        text, status = "interrupted; a new start goes on from the last checkpoint", 130
    if text and speaks(text):
        _say(text)
    return status


def _say(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()


def _set_up_logging(rank: int) -> None:
    """Messages of this package on stderr, from rank 0 alone; warnings of the others' packages."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s", force=True)
    logging.getLogger("nemo_dpo").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # megatron-core says so at each import, six times; the run logs which layers it uses.
    warnings.filterwarnings("ignore", message=".*Apex.* not installed")


def present_ranks(env: Mapping[str, str]) -> Ranks | None:
    """The ranks that torchrun or srun has started, or None. One lone srun task counts as none."""
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _number(env, "WORLD_SIZE")
        local = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else world
        return Ranks(_number(env, "RANK"), world, _number(env, "LOCAL_RANK"), local)
    if "SLURM_STEP_NUM_TASKS" in env and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        world = _number(env, "SLURM_STEP_NUM_TASKS")
        nodes = _number(env, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in env else 1
        return Ranks(_number(env, "SLURM_PROCID"), world, _number(env, "SLURM_LOCALID"), world // nodes)
    return None


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdecimal():
        raise ConfigError(
            f"{name}={value!r} in the environment is not the number that torchrun or srun sets; "
            "start the ranks with one of them, or unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS"
        )
    return int(value)


def accelerators() -> int:
    """NVIDIA devices that this process may use, counted without torch."""
    present = len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # As CUDA reads it: -1, or an empty entry, ends the list. (Names of devices may hold -1, too: GPU-8e6f…-1b2c…)
    named = itertools.takewhile(lambda entry: entry not in ("-1", ""), (part.strip() for part in visible.split(",")))
    return min(present, len(list(named)))


def check_host(cfg: Config, found: int) -> None:
    """What a configuration asks of this host: packages, accelerators (`found` of them), paths that have been run.

    Raises:
        ConfigError: the host does not have it.
    """
    if cfg.trainer.accelerator == "gpu" and not found:
        raise ConfigError(
            "trainer.accelerator=gpu but this host has no NVIDIA device; use trainer.accelerator=auto or cpu"
        )
    if cfg.model.transformer_engine and not importlib.util.find_spec("transformer_engine"):
        raise ConfigError("model.transformer_engine=true but transformer_engine is not installed; use null or false")
    if cfg.model.data.apply_ftfy and not importlib.util.find_spec("ftfy"):
        raise ConfigError("model.data.apply_ftfy=true but ftfy is not installed; pip install ftfy, or set it to false")
    unverified = [feature for feature, used in UNVERIFIED if found and used(cfg)]
    if unverified and not cfg.allow_unverified:
        raise ConfigError(
            f"{', '.join(unverified)} has not been run yet (docs/gpu.md); "
            "add allow_unverified=true to run it all the same, or trainer.accelerator=cpu"
        )


def check_torch(cfg: Config, found: int) -> None:
    """Whether torch, imported by now, can use the `found` accelerators of this host.

    Raises:
        ConfigError: it cannot and the configuration names them. Where that is left open one line says so.
    """
    import torch

    if not found or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
        reason = f"it counts {torch.cuda.device_count()}"
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
    text = f"this host has {found} NVIDIA devices but torch {torch.__version__} cannot use them ({reason})"
    if cfg.trainer.accelerator == "gpu":
        raise ConfigError(
            f"trainer.accelerator=gpu: {text}; install a torch build for CUDA and a driver that fits it, "
            "or use trainer.accelerator=cpu"
        )
    logger.warning("%s: running on the CPU", text)


def local_devices(cfg: Config, found: int) -> int:
    """Ranks wanted on this host, which has `found` accelerators."""
    if cfg.trainer.devices == "auto":
        return max(1, found)
    devices = int(cfg.trainer.devices)
    if found and devices > found:
        raise ConfigError(
            f"trainer.devices={devices} but this host has {found} accelerators; use at most {found}, "
            "or trainer.accelerator=cpu"
        )
    return devices


def check_ranks(cfg: Config, present: Ranks | None, devices: int) -> int:
    """All ranks of the run; ConfigError if those that exist are not those that the configuration names."""
    if present is None:
        if cfg.trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={cfg.trainer.num_nodes} but this process was started alone; "
                "start one process per rank with srun or torchrun"
            )
        return devices
    wanted = devices * cfg.trainer.num_nodes
    if cfg.trainer.devices != "auto" and wanted != present.world_size:
        raise ConfigError(
            f"trainer.devices={devices} × trainer.num_nodes={cfg.trainer.num_nodes} is {wanted} ranks, "
            f"but {present.world_size} were started; make the two agree"
        )
    return present.world_size


def _alone(rank: int, count: int) -> Ranks:
    """Rank `rank` of `count` on this host, which meet at a free port of it."""
    if rank == 0:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    return Ranks(rank, count, rank, count)


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
        os.environ["MASTER_ADDR"] = _first_host(os.environ.get("SLURM_STEP_NODELIST"))
    if "MASTER_PORT" not in os.environ:
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError("MASTER_PORT is not set and there is no Slurm job; export MASTER_PORT on every rank")
        restarts = _number(os.environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in os.environ else 0
        # As slurm/common.sh: the port of the start before may still be closing.
        os.environ["MASTER_PORT"] = str(20000 + (_number(os.environ, "SLURM_JOB_ID") * 10 + restarts) % 10000)


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
    """Run `run` in `count` children that are ranks of one run; returns the exit status of the first that failed."""
    if preload:
        importlib.import_module(preload)
    sys.stdout.flush()
    sys.stderr.flush()
    ranks = [_alone(rank, count) for rank in range(count)]
    children = {_fork(place, run): place.rank for place in ranks}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, _frame: _signal_all(children, received))
    for noted in signals.noted():  # between the forks and the lines above
        _signal_all(children, noted)
    return _wait(children)


def _fork(ranks: Ranks, run: Callable[[], int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        die_with(parent)
        signals.note_signals()
        _set_up_logging(ranks.rank)
        _export(ranks)
        status = _as_rank(run)
    except BaseException:
        sys.stderr.write(f"rank {ranks.rank}: {traceback.format_exc()}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the parent's exit handlers are not this process's


def _wait(children: Mapping[int, int]) -> int:
    """Wait for all `children` (process → rank); once one has failed the others have GRACE_SECONDS."""
    running, first, deadline = dict(children), 0, float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            rank, code = running.pop(pid), os.waitstatus_to_exitcode(status)
            if code and not first:
                first, deadline = code, time.monotonic() + GRACE_SECONDS
                if code < 0:
                    _say(f"rank {rank} was ended by {signal.Signals(-code).name}; the others cannot go on")
        elif time.monotonic() > deadline:
            _signal_all(running, signal.SIGKILL)
        time.sleep(0.02)
    return 128 - first if first < 0 else first


def _signal_all(children: Iterable[int], number: int) -> None:
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
