"""What each rank does in test_collective.py."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_dpo.parallel.collective import agree, on_rank_zero


class Fault(ValueError):
    """Raised on purpose."""


def fail_on(*ranks: int) -> Callable[[], str]:
    """An action that raises on `ranks` and names its rank elsewhere."""

    def action() -> str:
        if dist.get_rank() in ranks:
            raise Fault(f"rank {dist.get_rank()} failed")
        return f"rank {dist.get_rank()}"

    return action


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """What came back, or the kind and the text of the error and of what it came from."""
    try:
        return ("returned", call())
    except Exception as error:
        return (type(error).__name__, f"{error}" + (f" from {error.__cause__}" if error.__cause__ else ""))


def outcomes(rank: int) -> dict[str, Any]:
    """Every case in turn. The sum after each shows that the ranks are still in step."""
    calls: list[int] = []

    def counted() -> dict[str, int]:
        calls.append(rank)
        return {"made by": rank}

    cases: dict[str, Callable[[], Any]] = {
        "agree, no error": lambda: agree(fail_on()),
        "agree, rank 1 fails": lambda: agree(fail_on(1)),
        "agree, ranks 1 and 2 fail": lambda: agree(fail_on(1, 2)),
        "agree, all fail": lambda: agree(fail_on(0, 1, 2)),
        "on_rank_zero, no error": lambda: on_rank_zero(counted),
        "on_rank_zero, it fails": lambda: on_rank_zero(fail_on(0)),
    }
    found: dict[str, Any] = {}
    for name, call in cases.items():
        found[name] = outcome(call)
        together = torch.ones(())
        dist.all_reduce(together)
        found[f"{name}, then"] = together.item()
    found["calls"] = calls
    return found


def outlast_the_timeout(rank: int, folder: Path) -> dict[str, tuple[str, str]]:
    """Rank 0 works three times as long as a collective of training may take, then misses one as long."""
    limit = 1.0
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=limit)
    )

    def work() -> str:
        time.sleep(3 * limit)
        return "done"

    def collective() -> str:
        if rank == 0:
            return work()
        dist.all_reduce(torch.ones(()))
        return "reduced"

    return {"work of rank 0": outcome(lambda: on_rank_zero(work)), "hung collective": outcome(collective)}
