"""Stop requests by signal are noted, and acted on where all ranks can: at step boundaries and between preparations.

`note_signals` runs before anything heavy is imported, so that a signal in the seconds of start-up is not lost; this
module needs nothing but the standard library. Ctrl-C alone acts at once.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

REQUESTS = (signal.SIGTERM, signal.SIGUSR1)

_noted: set[int] = set()


class Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt: Lightning would turn that into exit status 1."""


def note_signals() -> None:
    """From now on SIGTERM and SIGUSR1 only leave a note, and SIGINT raises `Interrupted`."""
    for number in REQUESTS:
        signal.signal(number, lambda received, _frame: _noted.add(received))
    signal.signal(signal.SIGINT, _interrupt)


def ignore_requests() -> None:
    """For the last moments of a process: Python gives handlers back before it ends, and SIGUSR1 would kill it then."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted


def noted() -> frozenset[int]:
    """The signals received so far."""
    return frozenset(_noted)
