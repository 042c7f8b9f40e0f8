"""Ranks that hang or are gone: the others end in a stated time, each with its stacks written out, and one says who.

Two threads of each rank run beside the training. One sees to it that marks of progress are not further apart than the
limit; it needs nobody else, and ends the process. The other polls the store at which the ranks met, so that one rank
can ask all of them to write their stacks and to say where they are. Who does not answer is gone, or stopped.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import math
import os
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from nemo_dpo.one_line import one_line
from nemo_dpo.parallel import RankLost

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
ANSWER_SECONDS = 5.0  # for the others to answer, and for ranks that were asked to end by themselves
# Ours comes first: a time-out of torch's ends a process by itself, with NCCL without a Python error.
MARGIN = datetime.timedelta(minutes=1)
NAMED_RANKS = 8  # in a message
FAILED = "failed: "
# How torch and gloo say in a RuntimeError that a peer is gone or does not answer.
SIGNS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


@contextlib.contextmanager
def watching(limit: float, folder: Path) -> Iterator[Watch]:
    """Watch over this rank's part of a run.

    Args:
        limit: most seconds between two marks of progress.
        folder: where each rank writes its stacks, as rank_<n>.txt.

    Raises:
        RankLost: in place of an error of a collective whose other side is gone.
    """
    watch = Watch(limit, folder)
    watch.start()
    try:
        yield watch
    except Exception as error:
        watch.stop()
        if not is_lost(error):
            watch.tell(f"{FAILED}{type(error).__name__}: {_first_sentence(error)}")
            raise
        raise RankLost(watch.ask(_first_sentence(error))) from error
    finally:
        watch.stop()
        watch.join()


def is_lost(error: BaseException) -> bool:
    """Whether it is the failure of a collective, not of what this rank did."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


class Watch:
    """Of one rank, made in its main thread. See `watching`."""

    def __init__(self, limit: float, folder: Path) -> None:
        self._limit = limit
        self._folder = folder
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._main = threading.get_ident()
        self._work = ""
        self._deadline = math.inf
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._asking = threading.Lock()  # whichever thread comes second must not end the process before the first

    def start(self) -> None:
        """A rank that is alone waits for nobody."""
        for loop in (self._guard, self._listen) if self._world > 1 else ():
            self._start(loop)

    def stop(self) -> None:
        """This rank ends by itself."""
        self._ended.set()

    def join(self) -> None:
        """Wait for the threads: one that is in a call of torch's when Python ends would abort the process there."""
        end = time.monotonic() + 2 * ANSWER_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    @contextlib.contextmanager
    def over(self, work: str) -> Iterator[None]:
        """Inside, `mark` must be called within the limit, again and again."""
        self._work = work
        self.mark()
        try:
            yield
        finally:
            self._deadline = math.inf

    def mark(self) -> None:
        """There is progress."""
        self._deadline = time.monotonic() + self._limit

    def _start(self, action: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=action, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _within(self, seconds: float, action: Callable[[], object]) -> None:
        """Run `action`, but wait no longer than that: the other side of a store may have been stopped."""

        def run() -> None:
            with contextlib.suppress(RuntimeError):
                action()

        self._start(run).join(seconds)

    def tell(self, state: str) -> None:
        """Leave word for ranks that will ask, if the store can be reached."""
        if self._world > 1:
            self._within(ANSWER_SECONDS, lambda: self._store().set(self._key(self._rank), state))

    def ask(self, error: str) -> str:
        """After a collective's `error`: make every rank write its stacks; see `_ask` for what is returned."""
        with self._asking:
            work = f" in {self._work}" if self._work else ""
            return self._ask(f"rank {self._rank} lost a connection{work}: {error}", "lost a connection")

    def _ask(self, cause: str, state: str) -> str:
        """`cause` and who is where, in one line; "" if another rank says so."""
        self._ended.set()
        self._write_stacks()
        found: list[dict[int, str]] = []
        self._within(3 * ANSWER_SECONDS, lambda: found.append(self._gather(state)))
        if not found:
            return f"{cause}; the store that the ranks met at does not answer: rank 0 or its host is gone or stopped"
        (states,) = found
        failed = [f"rank {rank} {text}" for rank, text in states.items() if text.startswith(FAILED)]
        if failed:  # which has said so itself, where its output goes
            logger.error("rank %d ends: %s", self._rank, "; ".join(failed))
            return ""
        return f"{cause}; {_told(states, self._world)}. Stacks: {self._folder}" if states else ""

    def _guard(self) -> None:
        """End the process where no progress is made."""
        while not self._ended.wait(min(POLL_SECONDS, self._limit / 4)):
            if time.monotonic() > self._deadline:
                key = f"trainer.distributed_timeout_minutes={self._limit / 60:g}"
                with self._asking:
                    self._end(self._ask(f"no progress for {self._limit:g} s in {self._work} ({key})", self._where()))

    def _listen(self) -> None:
        """Answer when another rank asks; it asks because the run cannot go on."""
        with contextlib.suppress(RuntimeError):  # the store has gone with its rank: collectives will fail, or time out
            store = self._store()
            while not self._ended.wait(POLL_SECONDS):
                if store.check(["asked"]):
                    self._write_stacks()
                    store.set(self._key(self._rank), self._where())
                    if not self._ended.wait(3 * ANSWER_SECONDS):
                        self._end("")

    def _gather(self, state: str) -> dict[int, str]:
        """What each rank answers, by rank; nothing where another rank was the first to ask."""
        store = self._store()
        store.set(self._key(self._rank), state)
        if store.add("asked", 1) > 1:
            with contextlib.suppress(RuntimeError):  # the first has told, and the store went with it
                _until(lambda: store.check(["told"]), 2 * ANSWER_SECONDS)  # rank 0 must not take it away before
            return {}
        _until(lambda: len(self._answers(store)) == self._world, ANSWER_SECONDS)
        states = self._answers(store)
        store.set("told", "")
        return states

    def _answers(self, store: dist.Store) -> dict[int, str]:
        answered = [rank for rank in range(self._world) if store.check([self._key(rank)])]
        return {rank: store.get(self._key(rank)).decode() for rank in answered}

    def _store(self) -> dist.Store:
        """A connection of its own: the default group's is locked while the main thread waits."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = datetime.timedelta(seconds=ANSWER_SECONDS)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store over restarts
        return dist.PrefixStore(f"nemo_dpo/{attempt}", dist.TCPStore(host, port, is_master=False, timeout=timeout))

    @staticmethod
    def _key(rank: int) -> str:
        return f"at/{rank}"

    def _where(self) -> str:
        """The innermost line of the main thread that is neither torch's nor Python's own."""
        frame = sys._current_frames().get(self._main)
        while frame and _is_foreign(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return "at its end"
        return f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"

    def _write_stacks(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._rank}.txt").open("w", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {self._rank} in {self._work}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError:  # a full disk
            faulthandler.dump_traceback(sys.stderr)

    @staticmethod
    def _end(text: str) -> None:
        """The main thread may be in a call that never returns: no exit handlers."""
        if text:
            sys.stderr.write(f"\nerror: {text}\n")  # a progress bar may be on the line
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _is_foreign(file: str) -> bool:
    own = sysconfig.get_path("stdlib")
    return f"{os.sep}torch{os.sep}" in file or (file.startswith(own) and "site-packages" not in file)


def _until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(POLL_SECONDS / 5)


def _told(states: Mapping[int, str], world: int) -> str:
    """Who does not answer, then who is where, the fewest first."""
    places: dict[str, list[int]] = {}
    for rank, state in states.items():
        places.setdefault(state, []).append(rank)
    silent = [rank for rank in range(world) if rank not in states]
    told = [f"{_ranks(silent)} gave no answer: gone, or stopped"] if silent else []
    return "; ".join([*told, *(f"{_ranks(ranks)} {place}" for place, ranks in sorted(places.items(), key=_size))])


def _size(item: tuple[str, list[int]]) -> int:
    return len(item[1])


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
    return f"ranks {', '.join(map(str, ranks[:NAMED_RANKS]))}{more}"


def _first_sentence(error: BaseException) -> str:
    """The first sentence, without gloo's line of its source."""
    text = re.sub(r"^\[\S+:\d+\] ", "", one_line(error))
    return text.partition(". ")[0][:200]
