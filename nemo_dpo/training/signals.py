"""Stop requests: signals and the time limit are noted, and acted on at the next step boundary.

`note_signals` runs before torch is imported, so that a signal in the seconds of start-up is not lost. Ctrl-C alone acts
at once. This module imports nothing heavy.
"""

from __future__ import annotations

import re
import signal
import time
from types import FrameType
from typing import NoReturn

from nemo_dpo.config import ConfigError

_noted: list[int] = []


class Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt: Lightning would turn that into exit status 1."""


def note_signals() -> None:
    """From now on SIGTERM and SIGUSR1 only leave a note, and SIGINT raises `Interrupted`."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _frame: _noted.append(received))
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted


def noted() -> int:
    """The first signal received, or 0."""
    return _noted[0] if _noted else 0


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
