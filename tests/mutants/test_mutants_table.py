"""The parts of the mutation runner that cost nothing to try, so that the table keeps up with the code."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import child, operators
from tests.mutants.named import MUTATIONS, Mutation
from tests.mutants.runner import ROOT, Verdict, judge, module_of, shares
from tests.mutants.suites import SUITES

SOURCE = '''
"""Text 1."""
SIZE: int = 1


@decorate(1)
def f(a: Literal[1], b=0) -> Literal[1]:
    """Text 1."""
    logger.info("%d", a + 1)
    if not a:
        raise ValueError(f"{a + 1}")
    own_seed = 7 * a
    return g(a, b) + h(a, 2) < x.sum(b, strict=True)
'''
CHANGES = """
1 → 2
1 → (0)
0 → 1
0 → (-1)
not a → (a)
g(a, b) + h(a, 2) < x.sum(b, strict=True) → g(a, b) + h(a, 2) <= x.sum(b, strict=True)
g(a, b) + h(a, 2) → g(a, b) - h(a, 2)
g(a, b) → g(b, a)
2 → 3
2 → (1)
x.sum(b, strict=True) → x.mean(b, strict=True)
"""


def test_enough_mutations_of_different_names() -> None:
    names = Counter(mutation.name for mutation in MUTATIONS)
    assert len(names) >= 24 and set(names.values()) == {1}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_a_mutation_applies_and_names_a_test(mutation: Mutation) -> None:
    mutant = mutation.apply(ROOT)
    tree = ast.parse(mutant.source)
    assert ast.dump(tree) != ast.dump(ast.parse((ROOT / mutation.file).read_text(encoding="utf-8")))
    file, _, function = mutation.test.partition("::")
    assert f"def {function.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


def test_tests_are_shared_out_by_files() -> None:
    tests = ["a::1", "b::1", "a::2", "c::1", "a::3", "d"]
    assert shares(tests, 2) == [["a::1", "a::2", "a::3"], ["b::1", "c::1", "d"]]
    assert shares(["a"], 2) == [["a"]]


def test_a_mutation_whose_text_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("a = 1 + 1")
    with pytest.raises(ValueError, match=r"name: file\.py holds 2 times: 1"):
        Mutation("name", "file.py", "1", "2", "").apply(tmp_path)


def test_every_suite_is_there() -> None:
    paths = {test.partition("::")[0] for suite in SUITES.values() for test in suite}
    assert all((ROOT / path).exists() for path in [*SUITES, *paths])


def test_every_module_of_losses_and_parallel_has_a_suite() -> None:
    folders = (ROOT / "nemo_dpo" / name for name in ("losses", "metrics", "parallel"))
    modules = {f"{path.relative_to(ROOT)}" for folder in folders for path in folder.glob("*.py")}
    assert {path for path in modules - SUITES.keys() if not path.endswith("__init__.py")} == set()


def test_operator_changes_by_hand() -> None:
    found = operators.changes("file.py", SOURCE)
    assert [f"{change.old} → {change.new}" for change in found] == CHANGES.split("\n")[1:-1]
    for change in found:
        assert change.apply(SOURCE).count("\n") == SOURCE.count("\n")
        ast.parse(change.apply(SOURCE))


def test_the_sample_is_fixed_and_without_repeats() -> None:
    first = operators.sample(ROOT, SUITES)
    assert first == operators.sample(ROOT, SUITES)
    assert len({(mutant.file, mutant.source) for mutant in first}) == operators.SAMPLE
    for mutant in first:
        ast.parse(mutant.source)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AssertionError("assert 1 == 2"), child.ASSERTION),
        (pytest.fail.Exception("DID NOT RAISE ValueError"), child.ASSERTION),
        (pytest.fail.Exception("Timeout (>300.0s) from pytest-timeout."), child.HUNG),
        (AssertionError("no end after 180 s:\n…"), child.HUNG),
        (AssertionError("Traceback …\nModuleNotFoundError: No module named 'x'\nassert 1 == 0"), child.IMPORT),
        (ImportError("x"), child.IMPORT),
        (KeyError("x"), child.OTHER),
    ],
)
def test_kinds_of_failure(error: BaseException, kind: str) -> None:
    with pytest.raises(type(error)) as caught:
        raise error
    assert child.kind_of(caught) == kind


def report(*kinds: str, passed: bool = True) -> dict[str, object]:
    failures = [{"test": "t", "kind": kind, "message": "m"} for kind in kinds]
    return {"imported": True, "failures": failures, "passed": {"u": 1.0} if passed else {}}


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (report(), Verdict.SURVIVED),
        (report(child.OTHER, child.ASSERTION), Verdict.CAUGHT),
        (report(child.OTHER), Verdict.CRASHED),
        (report(child.OTHER, child.HUNG), Verdict.HUNG),
        (report(child.OTHER, child.IMPORT), Verdict.BROKEN),
        (report(passed=False), Verdict.BROKEN),
        ({**report(), "imported": False}, Verdict.BROKEN),
        ({}, Verdict.HUNG),
        (None, Verdict.CRASHED),
    ],
)
def test_verdicts(given: dict[str, object] | None, verdict: Verdict) -> None:
    assert judge(given)[0] is verdict


def test_module_names() -> None:
    assert module_of("nemo_dpo/losses/__init__.py") == "nemo_dpo.losses"
    assert module_of("nemo_dpo/logprobs.py") == "nemo_dpo.logprobs"
