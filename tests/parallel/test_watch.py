"""What a rank says of the others, and which errors are those of a lost connection."""

from __future__ import annotations

import re
from pathlib import Path

import torch.distributed as dist

from nemo_dpo.parallel.watch import NAMED_RANKS, _first_sentence, _told, is_lost
from tests.parallel.watch_cases import ask_one_that_has_failed, ask_the_other, threads_left
from tests.support.ranks import run_ranks

GLOO = RuntimeError(
    "[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:4929. This is typical. GLHF!"
)


def test_who_does_not_answer_comes_first_then_the_fewest() -> None:
    states = {0: "at a.py:1 (f)", 1: "at a.py:1 (f)", 3: "at b.py:2 (g)"}
    assert _told(states, 5) == (
        "ranks 2, 4 gave no answer: gone, or stopped; rank 3 at b.py:2 (g); ranks 0, 1 at a.py:1 (f)"
    )
    assert _told({0: "x"}, 1) == "rank 0 x"


def test_many_ranks_are_counted() -> None:
    world = NAMED_RANKS + 4
    assert _told({0: "x"}, world) == f"ranks 1, 2, 3, 4, 5, 6, 7, 8 and {world - 9} more gave no answer: gone, or " + (
        "stopped; rank 0 x"
    )


def test_errors_of_collectives_and_others() -> None:
    assert is_lost(GLOO)
    assert is_lost(dist.DistNetworkError("the client socket has failed to connect"))
    assert not is_lost(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not is_lost(ValueError("Connection closed by peer"))


def test_an_error_in_first_sentence() -> None:
    assert _first_sentence(GLOO) == "Connection closed by peer [::1]:4929"
    assert _first_sentence(RuntimeError("a\nb")) == "a b"


def test_no_thread_outlives_the_watch(tmp_path: Path) -> None:
    """One that came back from a call of torch's while Python ended aborted the rank, in one of two such ends."""
    assert run_ranks(2, threads_left, tmp_path, tmp_path) == [[], []]


def test_who_is_asked_says_where_it_is(tmp_path: Path) -> None:
    told, _ = run_ranks(2, ask_the_other, tmp_path, tmp_path)
    where = r"rank 0 lost a connection; rank 1 at watch_cases\.py:\d+ \(_asked\)"
    pattern = rf"rank 0 lost a connection: it is gone; {where}\. Stacks: {re.escape(str(tmp_path / 'stacks'))}"
    assert re.fullmatch(pattern, told), told
    assert {path.name for path in (tmp_path / "stacks").iterdir()} == {"rank_0.txt", "rank_1.txt"}


def test_who_has_failed_has_said_so(tmp_path: Path) -> None:
    """Then it is not this rank's to say; it logs whose."""
    told, _ = run_ranks(2, ask_one_that_has_failed, tmp_path, tmp_path)
    assert told == ""
    assert "rank 0 ends: rank 1 failed: ValueError: no pairs" in (tmp_path / "log.txt").read_text()
