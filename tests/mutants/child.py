"""Inside the process that tries one mutant: import the mutated module, run pytest, note how tests failed.

The process is a fork of one that has imported everything, as an interpreter that starts from nothing spends more time
on imports than on most tests. What it has of this repository is the original, and is forgotten first.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.parallel.processes import die_with

ASSERTION, HUNG, IMPORT, OTHER = "assertion", "hung", "import", "other"
# A run of the command line that died of these says nothing about what its test asserts.
IMPORT_ERRORS = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError")
# How pytest-timeout and tests.support.cli word the end of their patience; both are no other exceptions than assertions.
OUT_OF_TIME = ("Timeout (>", "no end after")


class Recorder:
    """Notes failures by kind, and ends the session at the first failed assertion."""

    def __init__(self) -> None:
        self.failures: list[dict[str, str]] = []
        self.passed: set[str] = set()
        self.seconds: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
        report: pytest.TestReport = yield
        self.seconds[item.nodeid] += call.duration  # type: ignore[assignment]  # a Counter of seconds
        if report.failed and call.excinfo is not None:
            kind = kind_of(call.excinfo)
            self.failures.append({"test": item.nodeid, "kind": kind, "message": summary(call.excinfo)})
            if kind == ASSERTION:
                item.session.shouldstop = "caught"
        elif report.when == "call" and report.passed:
            self.passed.add(item.nodeid)
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append({"test": report.nodeid, "kind": IMPORT, "message": str(report.longrepr)[-500:]})


def kind_of(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """A failed assertion, an end of patience, or something that the mutant broke on the way."""
    text = str(excinfo.value)
    if not excinfo.errisinstance((AssertionError, pytest.fail.Exception)):
        return IMPORT if excinfo.typename in IMPORT_ERRORS else OTHER
    if text.startswith(OUT_OF_TIME):
        return HUNG
    return IMPORT if any(f"{name}:" in text for name in IMPORT_ERRORS) else ASSERTION


def summary(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """Type and first line, for the table."""
    lines = str(excinfo.value).strip().splitlines()
    return f"{excinfo.typename}: {lines[0] if lines else ''}"[:160]


def main(folder: Path, module: str, arguments: list[str]) -> None:
    """Import `module` and run pytest in `folder`, a copy of the repository; results go to its report.json.

    The report: {"imported": bool, "failures": [{"test", "kind", "message"}], "passed": {test: seconds}}.
    """
    die_with(os.getppid())
    _move_to(folder)
    recorder, imported = Recorder(), True
    try:
        origin = importlib.import_module(module).__file__
        assert origin and Path(origin).is_relative_to(folder), f"{origin} is not the copy"
    except Exception:
        traceback.print_exc()
        imported = False
    if imported:
        # -s: what tests fork writes to sys.stderr as pytest left it, and some tests read that from descriptor 2.
        pytest.main(["-q", "-s", "-p", "pytest_timeout", "-p", "no:cacheprovider", *arguments], plugins=[recorder])
    passed = {test: recorder.seconds[test] for test in recorder.passed}
    report = {"imported": imported, "failures": recorder.failures, "passed": passed}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _move_to(folder: Path) -> None:
    """Leave the original repository: its modules, its working directory, its output, its process group."""
    os.setsid()
    os.chdir(folder)
    with open("output.txt", "wb", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(PYTHONPATH=str(folder), OMP_NUM_THREADS="1", TMPDIR=str(folder / "tmp"))
    # Its threads would be missing in what tests fork after one that has tokenised here, which would wait for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tempfile.tempdir = None
    # Two mutants of one file may have the same size and be written within a second: bytecode would be stale.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    # Other packages' plugins, compiled anew each time, would take longer than most tests.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] in ("nemo_dpo", "tests")]:
        del sys.modules[name]
    gc.freeze()  # pytest collects garbage several times over; what was imported before is none
    # A fork server reached from here would be the one that this process comes from, which has the original.
    multiprocessing.get_context = functools.partial(_context, multiprocessing.get_context)


def _context(get_context: Any, method: str | None = None) -> Any:
    return get_context("fork" if method == "forkserver" else method)
