"""What each rank does in test_watch.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path

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
