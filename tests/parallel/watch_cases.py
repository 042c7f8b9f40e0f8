"""What each rank does in test_watch.py."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

from nemo_dpo.parallel import watch


class SlowStore:
    """One whose answers take their time."""

    def check(self, keys: list[str]) -> bool:
        """Nobody has asked."""
        time.sleep(0.5)
        return False


def threads_left(rank: int, folder: Path) -> list[str]:
    """Those of a watch that ends while it waits for an answer."""
    watch.POLL_SECONDS = 0.01
    watch.Watch._store = lambda self: SlowStore()  # type: ignore[assignment,method-assign,return-value]
    before = set(threading.enumerate())
    with watch.watching(60, folder):
        time.sleep(0.2)
        began = set(threading.enumerate()) - before
    assert len(began) == 2
    return [thread.name for thread in began if thread.is_alive()]


def ask_the_other(rank: int, folder: Path) -> str:
    """Rank 0 asks, while rank 1 waits for it in a barrier; what rank 0 is told."""
    return _asked(rank, folder, fails=False)


def ask_one_that_has_failed(rank: int, folder: Path) -> str:
    """Rank 1 has left word of its failure before; what rank 0 is told, and what it logs."""
    return _asked(rank, folder, fails=True)


def _asked(rank: int, folder: Path, *, fails: bool) -> str:
    watch.POLL_SECONDS = 0.05
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store else None]
    dist.broadcast_object_list(port)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port[0]))
    logging.basicConfig(filename=folder / "log.txt", force=True)
    with watch.watching(60, folder / "stacks") as watched:
        if rank == 1 and fails:
            watched.tell("failed: ValueError: no pairs")
        dist.barrier()
        told = watched.ask("it is gone") if rank == 0 else ""
        dist.barrier()
    return told
