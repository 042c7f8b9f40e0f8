"""What asks a run to stop before its last step, and what it does then.

| asked by | in a Slurm job | elsewhere |
|---|---|---|
| SIGTERM: preemption, `scancel`; `docker stop`, `kill` | waits until Slurm ends it | ends |
| SIGUSR1: the job's time is nearly over; `max_time_per_run` | ends; a file asks the batch script to requeue | ends |

Always after everything is saved, and with status 0. Slurm requeues by itself what it preempts, but only what is still
there when the grace time is over; and a job that was cancelled must stay so. Hence SIGTERM never asks for a requeue,
and it counts more than SIGUSR1.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from nemo_dpo.config import ConfigError
from nemo_dpo.training import signals

logger = logging.getLogger(__name__)

REQUEUE_FILE = "NEMO_DPO_REQUEUE_FILE"  # the environment's name of the path that the batch script looks at


class TimeLimit:
    """A limit on the wall-clock time of one run, in NeMo's DD:HH:MM:SS; None never ends.

    Raises:
        ConfigError: the text is no duration.
    """

    def __init__(self, text: str | None) -> None:
        self._end = None if text is None else time.monotonic() + self._seconds(text)

    def over(self) -> bool:
        """Whether the time has run out."""
        return self._end is not None and time.monotonic() >= self._end

    @staticmethod
    def _seconds(text: str) -> int:
        match = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", text)
        if not match:
            raise ConfigError(f"exp_manager.max_time_per_run={text!r} is not DD:HH:MM:SS, for example 00:03:45:00")
        days, hours, minutes, seconds = map(int, match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class Stop:
    """A request to stop.

    Attributes:
        reason: what asks.
        goes_on: whether another start is to go on at once.
    """

    reason: str
    goes_on: bool


TERMINATED = Stop("SIGTERM", goes_on=False)
NOTICE = Stop("SIGUSR1", goes_on=True)
OUT_OF_TIME = Stop("exp_manager.max_time_per_run is over", goes_on=True)
STRONGEST_FIRST = (TERMINATED, NOTICE, OUT_OF_TIME)


class Stopped(Exception):
    """A run ends early, on all ranks alike, because it was asked to; `where` says how far it came."""

    def __init__(self, stop: Stop, where: str) -> None:
        super().__init__(stop, where)
        self.stop = stop
        self.where = where


def own_request(limit: TimeLimit) -> Stop | None:
    """What asks this process to stop."""
    noted = signals.noted()
    asked = (signal.SIGTERM in noted, signal.SIGUSR1 in noted, limit.over())
    return next((stop for stop, is_asked in zip(STRONGEST_FIRST, asked, strict=True) if is_asked), None)


def any_request(limit: TimeLimit, device: torch.device) -> Stop | None:
    """What asks any of the ranks to stop, the strongest of it; the same answer on all. Collective."""
    own = own_request(limit)
    urgency = 0 if own is None else len(STRONGEST_FIRST) - STRONGEST_FIRST.index(own)
    found = torch.tensor(urgency, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return STRONGEST_FIRST[-int(found)] if found else None


def leave(stop: Stop, progress: str) -> None:
    """The last thing that a stopped run does, when everything is saved and the ranks need each other no more.

    Args:
        stop: the same on all ranks, or those that wait would be left by the others.
        progress: what the next start goes on from; requeueing ends where it stays the same.
    """
    if stop.goes_on:
        cancelled = signal.SIGTERM in signals.noted()  # in the last moment: it must not come back
        if REQUEUE_FILE in os.environ and os.environ["RANK"] == "0" and not cancelled:
            _write_whole(Path(os.environ[REQUEUE_FILE]), f"{progress}\n")
    elif "SLURM_JOB_ID" in os.environ:
        logger.warning("waiting for Slurm to end or requeue the job; another SIGTERM ends this process")
        _wait_for_the_end()


def _wait_for_the_end() -> NoReturn:
    # Nothing is left to lose. Ignored, Slurm's next SIGTERM would cost KillWait, 30 s on most clusters.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        signal.pause()


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
