"""Actions that must succeed on every rank or fail on every rank: no rank is left waiting for one that has raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


def agree(action: Callable[[], T]) -> T:
    """Run `action` here; if it raised on any rank, raise on all (the error of the lowest such rank). Collective."""
    result, error = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:  # the latter is a bare BaseException; handed to every rank below
        error = caught
    errors: list[BaseException | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((caught for caught in errors if caught is not None), None)
    if first is not None:
        raise first from error
    return result  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; every rank gets its (picklable) result or raises its error. Collective."""
    result = agree(lambda: action() if dist.get_rank() == 0 else None)
    box = [result]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]
