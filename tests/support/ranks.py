"""Run a function in processes that are gloo ranks of one group, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.support.cli  # noqa: F401  tells the fork server what to import


def run_ranks(
    world: int, function: Callable[..., Any], folder: Path, *arguments: Any, timeout: float = 120
) -> list[Any]:
    """`function(rank, *arguments)` in `world` processes → what each returned, by rank.

    Args:
        function: of a module that can be imported; an exception in any rank fails the test.
        folder: an empty one, for the rendezvous and the results.
    """
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=_rank, args=(rank, world, folder, function, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    errors = "".join(file.read_text() for file in sorted(folder.glob("*.error")))
    assert [process.exitcode for process in processes] == [0] * world, errors or f"no end after {timeout} s"
    import torch

    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
