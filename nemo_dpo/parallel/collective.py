"""Actions that must succeed on every rank or fail on every rank: no rank is left waiting for one that has raised.

Such actions run on the host and may take hours (rank 0 tokenises a large file, writes an archive), while a collective
of training that takes half an hour hangs. So the ranks wait for them in a group of their own: gloo, whatever the
default backend is, with more patience. A rank that dies still ends the wait at once, for its connection closes.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)


def gather(value: T) -> list[T]:
    """Every rank's `value`, by rank. Collective."""
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=_waiting_group(dist.group.WORLD))
    return found  # type: ignore[return-value]


def gather_on_rank_zero(value: T) -> list[T]:
    """Every rank's `value`, by rank, on rank 0; nothing on the others. Collective."""
    found: list[T | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found, dst=0, group=_waiting_group(dist.group.WORLD))
    return found or []  # type: ignore[return-value]


def agree(action: Callable[[], T]) -> T:
    """Run `action` here; if it raised on any rank, raise on all (the error of the lowest such rank). Collective."""
    result, error = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:  # the latter is a bare BaseException; handed to every rank below
        error = caught
    first = next((caught for caught in gather(error) if caught is not None), None)
    if first is not None:
        raise first from error
    return result  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; every rank gets its (picklable) result or raises its error. Collective."""
    return gather(agree(lambda: action() if dist.get_rank() == 0 else None))[0]  # type: ignore[return-value]


@functools.cache
def _waiting_group(_world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Of the ranks of the default group `_world`, made when it is first asked for."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
