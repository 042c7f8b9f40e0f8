"""Try deliberate bugs: run tests on a copy of the repository that holds one, and say whether an assertion failed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tests.mutants import child

ROOT = Path(__file__).parents[2]
COPIED = ("nemo_dpo", "tests", "conf", "examples", "tools", "pyproject.toml")
PRELOADED = ["tests.support.preload", "pytest", "pytest_timeout", "hypothesis"]
WORKERS = 2
BASELINE_SECONDS = 1200

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Mutant:
    """One deliberate bug.

    Attributes:
        name: unique, for people.
        file: which file it is in, below the repository's root.
        source: what that file holds with the bug.
        tests: node ids of the tests that should notice, in the order in which they run.
    """

    name: str
    file: str
    source: str
    tests: tuple[str, ...]


class Verdict(Enum):
    """What came of a mutant."""

    CAUGHT = "caught"  # an assertion failed
    HUNG = "hung"  # no assertion failed, but something did not end in time
    CRASHED = "crashed"  # no assertion failed, but a test raised something else
    SURVIVED = "survived"  # all tests passed
    BROKEN = "broken"  # it does not compile or import, or no test ran: nothing was tried


@dataclass(frozen=True)
class Outcome:
    """The verdict, the test that gave it, and how long it took."""

    mutant: Mutant
    verdict: Verdict
    detail: str
    seconds: float


class Workspace:
    """A copy of the repository in which one mutant at a time is tried."""

    def __init__(self, snapshot: Path, folder: Path) -> None:
        self.folder = folder
        copy_repository(snapshot, folder)
        (folder / "tmp").mkdir()

    def attempt(self, mutant: Mutant, timeout: float) -> Outcome:
        """Put the mutant in, run its tests, take it out."""
        started = time.monotonic()
        path = self.folder / mutant.file
        try:
            compile(mutant.source, mutant.file, "exec")
        except SyntaxError as error:
            return Outcome(mutant, Verdict.BROKEN, str(error), 0.0)
        original = path.read_text(encoding="utf-8")
        path.write_text(mutant.source, encoding="utf-8")
        try:
            report = self.run_tests(module_of(mutant.file), mutant.tests, timeout)
        finally:
            path.write_text(original, encoding="utf-8")
        return Outcome(mutant, *judge(report), time.monotonic() - started)

    def run_tests(self, module: str, tests: Sequence[str], timeout: float) -> dict[str, Any] | None:
        """The report of tests.mutants.child on `tests`; None if it left none, an empty one if it was stopped."""
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        arguments = [f"--basetemp={self.folder / 'tmp' / 'pytest'}", *tests]
        process = _context.Process(target=child.main, args=(self.folder, module, arguments))
        process.start()
        assert process.pid, "killing group 0 would kill this process"
        process.join(timeout)
        stopped = process.is_alive()
        with contextlib.suppress(ProcessLookupError):  # also what it started and did not wait for
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if stopped:
            return {}
        return json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None


def judge(report: dict[str, Any] | None) -> tuple[Verdict, str]:
    """The verdict and what it rests on; `report` as `Workspace.run_tests` gives it."""
    if report is None:
        return Verdict.CRASHED, "the test process died"
    if not report:
        return Verdict.HUNG, "the tests did not end in time"
    if not report["imported"]:
        return Verdict.BROKEN, "the module does not import"
    order = (
        (child.ASSERTION, Verdict.CAUGHT),
        (child.IMPORT, Verdict.BROKEN),
        (child.HUNG, Verdict.HUNG),
        (child.OTHER, Verdict.CRASHED),
    )
    for kind, verdict in order:
        for failure in report["failures"]:
            if failure["kind"] == kind:
                return verdict, f"{failure['test']}: {failure['message']}"
    return (Verdict.SURVIVED, "") if report["passed"] else (Verdict.BROKEN, "no test ran")


class Laboratory:
    """Tries mutants, `WORKERS` at a time, on copies of one snapshot of the repository."""

    def __init__(self, folder: Path) -> None:
        self.snapshot = folder / "snapshot"
        copy_repository(ROOT, self.snapshot)
        _context.set_forkserver_preload(PRELOADED)
        self._workspaces: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
        for number in range(WORKERS):
            self._workspaces.put(Workspace(self.snapshot, folder / str(number)))
        self._threads = ThreadPoolExecutor(WORKERS)
        self._seconds: dict[str, float] = {}
        self._green: set[str] = set()

    def check_green(self, tests: Sequence[str]) -> None:
        """Run `tests` without a mutant, once each; what fails now could not convict one."""
        new = list(dict.fromkeys(test for test in tests if test not in self._green))
        for passed in self._threads.map(self._baseline, shares(new, WORKERS)):
            self._seconds |= passed
        idle = [test for test in new if not self._runs(test)]
        assert not idle, f"not run, or skipped: {idle}"
        self._green.update(new)

    def _baseline(self, tests: Sequence[str]) -> dict[str, float]:
        """Seconds of each test that has passed; all must."""
        workspace = self._workspaces.get()
        try:
            report = workspace.run_tests("nemo_dpo", tests, BASELINE_SECONDS)
            output = (workspace.folder / "output.txt").read_text(encoding="utf-8")
        finally:
            self._workspaces.put(workspace)
        assert report and not report["failures"], f"without any mutant:\n{output[-6000:]}"
        return dict(report["passed"])

    def _runs(self, test: str) -> list[float]:
        """Seconds of each passed test that a node id (of a test, a file or a folder) stands for."""
        return [seconds for node, seconds in self._seconds.items() if re.match(rf"{re.escape(test)}($|\[|::|/)", node)]

    def submit(self, mutant: Mutant, patience: float | None = None) -> Future[Outcome]:
        """Try a mutant as soon as a worker is free; patience is a multiple of what its tests took without it."""
        usual = 60 + 4 * sum(sum(self._runs(test)) for test in mutant.tests)
        return self._threads.submit(self._attempt, mutant, patience or usual)

    def _attempt(self, mutant: Mutant, timeout: float) -> Outcome:
        workspace = self._workspaces.get()
        try:
            return workspace.attempt(mutant, timeout)
        finally:
            self._workspaces.put(workspace)

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        self._threads.shutdown(cancel_futures=True)


def shares(tests: Sequence[str], count: int) -> list[list[str]]:
    """`tests` in at most `count` parts of similar length; those of one file stay together, for they share fixtures."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    parts: list[list[str]] = [[] for _ in range(count)]
    for of_file in sorted(files.values(), key=len, reverse=True):
        min(parts, key=len).extend(of_file)
    return [part for part in parts if part]


def copy_repository(source: Path, into: Path) -> None:
    """What tests of the package need, without bytecode."""
    into.mkdir(parents=True)
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, into / name)


def module_of(file: str) -> str:
    """nemo_dpo/losses/__init__.py → nemo_dpo.losses"""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a mutant."""
    return "\n".join(f"{o.verdict.value:9}{o.seconds:4.0f} s  {o.mutant.name}  [{o.detail}]" for o in outcomes)
