"""Deliberate bugs, each of which tests must notice: by name one test each, and a sample of all small changes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.mutants import operators
from tests.mutants.named import MUTATIONS
from tests.mutants.runner import Laboratory, Mutant, Outcome, Verdict, table
from tests.mutants.suites import SUITES

pytestmark = [pytest.mark.mutants, pytest.mark.timeout(1800)]

LEAST_SHARE = 0.9
TRIAL_TEST = "tests/losses/test_objective.py::test_weights"
TRIAL_FILE = "nemo_dpo/losses/sft.py"
TRIALS = {
    "a comment": ("# a comment\n", Verdict.SURVIVED),
    "an assertion that fails": (
        "def sft(stats, ctx):\n    return sum_over_pairs(0 * stats.chosen.logps)\n",
        Verdict.CAUGHT,
    ),
    "an exception": ("def sft(stats, ctx):\n    raise KeyError\n", Verdict.CRASHED),
    "a syntax error": ("def\n", Verdict.BROKEN),
    "an import error": ("import nemo_dpo.nowhere\n", Verdict.BROKEN),
    "a late import error": ("def sft(stats, ctx):\n    import nemo_dpo.nowhere\n", Verdict.BROKEN),
    "a name that is gone": ("del sft\n", Verdict.BROKEN),
    "an end of the process": ("def sft(stats, ctx):\n    import os\n    os._exit(0)\n", Verdict.CRASHED),
    "no end": ("def sft(stats, ctx):\n    while True:\n        pass\n", Verdict.HUNG),
}


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    # Not pytest's tmp_path: the names of sockets in it would be too long.
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        lab = Laboratory(Path(folder))
        try:
            yield lab
        finally:
            lab.close()


@pytest.fixture(scope="module")
def named(laboratory: Laboratory, request: pytest.FixtureRequest) -> dict[str, Future[Outcome]]:
    """Those that are to be tried, by name; all wait for a worker from the start."""
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    mutations = [mutation for mutation in MUTATIONS if mutation.name in wanted]
    laboratory.check_green([mutation.test for mutation in mutations])
    return {mutation.name: laboratory.submit(mutation.apply(laboratory.snapshot)) for mutation in mutations}


@pytest.mark.parametrize("trial", TRIALS)
def test_the_runner_tells_verdicts_apart(laboratory: Laboratory, trial: str) -> None:
    addition, verdict = TRIALS[trial]
    laboratory.check_green([TRIAL_TEST])
    source = (laboratory.snapshot / TRIAL_FILE).read_text(encoding="utf-8") + "\n\n" + addition
    outcome = laboratory.submit(Mutant(trial, TRIAL_FILE, source, (TRIAL_TEST,)), patience=20).result()
    assert outcome.verdict is verdict, outcome.detail


@pytest.mark.parametrize("name", [mutation.name for mutation in MUTATIONS])
def test_a_named_mutation_is_caught(
    named: dict[str, Future[Outcome]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = named[name].result()
    with capsys.disabled():
        print(f"\n{table([outcome])}", end=" ", flush=True)
    assert outcome.verdict is Verdict.CAUGHT


def test_operator_mutants_are_killed(laboratory: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    """By a failed assertion, or because something did not end; a mere exception in a test is not enough."""
    mutants = operators.sample(laboratory.snapshot, SUITES)
    laboratory.check_green([test for suite in SUITES.values() for test in suite])
    outcomes = [future.result() for future in [laboratory.submit(mutant) for mutant in mutants]]
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    others = [outcome for outcome in outcomes if outcome.verdict is not Verdict.CAUGHT]
    with capsys.disabled():
        print(f"\n{ {verdict.value: count for verdict, count in verdicts.items()} }; not caught:\n{table(others)}")
    assert len(outcomes) == operators.SAMPLE
    assert verdicts[Verdict.CAUGHT] + verdicts[Verdict.HUNG] >= LEAST_SHARE * len(outcomes)
