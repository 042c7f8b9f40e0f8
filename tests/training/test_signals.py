"""Stop requests: which signals leave a note and which acts at once, which counts most; the limit on a run's time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_dpo.config import ConfigError
from nemo_dpo.training import leave, signals
from nemo_dpo.training.leave import NOTICE, OUT_OF_TIME, TERMINATED, Stop, TimeLimit
from tests.support.ranks import run_ranks
from tests.training import stop_cases

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def noting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Handlers as a run has them, and no note; afterwards the test process has its own again."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    monkeypatch.setattr(signals, "_noted", set())
    signals.note_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_noted_before_a_signal_comes() -> None:
    assert signals.noted() == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_leaves_a_note_and_interrupts_nothing(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    assert signals.noted() == {number}


@pytest.mark.parametrize(
    ("numbers", "over", "expected"),
    [
        ([], False, None),
        ([], True, OUT_OF_TIME),
        ([signal.SIGUSR1], True, NOTICE),
        ([signal.SIGUSR1, signal.SIGTERM], True, TERMINATED),
        ([signal.SIGTERM, signal.SIGUSR1], False, TERMINATED),
    ],
)
def test_the_strongest_request_counts(
    monkeypatch: pytest.MonkeyPatch, numbers: list[int], over: bool, expected: Stop | None
) -> None:
    """A run that is cancelled while it saves for a requeue must not ask for one."""
    limit = TimeLimit(None)
    monkeypatch.setattr(limit, "over", lambda: over)
    for number in numbers:
        os.kill(os.getpid(), number)
    assert leave.own_request(limit) == expected


@pytest.mark.parametrize(
    ("noted", "over", "expected"),
    [
        ([[], []], [False, False], None),
        ([[], []], [False, True], OUT_OF_TIME),
        ([[], [signal.SIGUSR1]], [True, False], NOTICE),
        ([[signal.SIGUSR1], [signal.SIGTERM]], [False, False], TERMINATED),
    ],
)
def test_all_ranks_follow_the_strongest_request_of_any(
    tmp_path: Path, noted: list[list[int]], over: list[bool], expected: Stop | None
) -> None:
    assert run_ranks(2, stop_cases.what_all_answer, tmp_path, noted, over) == [expected] * 2


def test_requests_in_the_last_moments_do_nothing() -> None:
    signals.ignore_requests()
    for number in signals.REQUESTS:
        os.kill(os.getpid(), number)
    assert signals.noted() == set()


def test_ctrl_c_acts_at_once() -> None:
    with pytest.raises(signals.Interrupted):
        signal.raise_signal(signal.SIGINT)
    assert signals.noted() == set()


def test_ctrl_c_is_caught_by_no_handler_of_errors() -> None:
    """Lightning answers a KeyboardInterrupt by exit status 1, and `except Exception` must not swallow it."""
    assert not issubclass(signals.Interrupted, Exception | KeyboardInterrupt)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:00:07", 7), ("00:00:01:00", 60), ("00:03:45:00", 13500), ("02:00:00:01", 172801), ("0:0:90:0", 5400)],
)
def test_time_limit(monkeypatch: pytest.MonkeyPatch, text: str, seconds: int) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit = TimeLimit(text)
    now[0] += seconds - 0.5
    assert not limit.over()
    now[0] += 0.5
    assert limit.over()


def test_no_limit_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = TimeLimit(None)
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    assert not limit.over()


@pytest.mark.parametrize("text", ["", "3600", "01:00:00", "1 day", "00:00:00:-5", "00:00:00:07\n", "00:00:00:0.5"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"max_time_per_run=.* DD:HH:MM:SS"):
        TimeLimit(text)
