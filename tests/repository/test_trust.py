"""Files from outside are data: no call that could run code of theirs, but those listed with their reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

WEIGHTS, SHARDED, MODEL_YAML, WRITING = (
    f"nemo_dpo/checkpoint/{name}.py" for name in ("weights", "sharded", "model_yaml", "writing")
)
# (file, call) → why it may be there.
AUDITED = {
    (MODEL_YAML, "yaml.load"): "with a loader derived from SafeLoader",
    (WEIGHTS, "pickle.Unpickler"): "base of an unpickler that knows the classes of an index only",
    (WRITING, "pickle.load"): "from this process's own fork, by a file without a name",
    (SHARDED, "dist_checkpointing.load"): "checkpoints of the run itself, which docs/runs.md says to trust",
}
FORBIDDEN = {
    *(f"{module}.{name}" for module in ("pickle", "_pickle", "dill", "cloudpickle") for name in ("load", "loads")),
    *("pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "eval", "exec", "compile"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "dist_checkpointing.load"),
}
# Calls that are right with one argument only: (name, argument, its value).
NEEDED = {"torch.load": ("weights_only", True)}
REFUSED_ARGUMENTS = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True), ("weights_only", False)}


def findings(source: str) -> Iterator[str]:
    """What `source` uses of the above."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield from (name for name in map(ast.unparse, node.bases) if name in FORBIDDEN)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        yield from (
            f"{argument}={value}" for argument, value in given.items() if (argument, value) in REFUSED_ARGUMENTS
        )
        if name in FORBIDDEN:
            yield name
        if name in NEEDED and given.get(NEEDED[name][0]) is not NEEDED[name][1]:
            yield name


def imported_alone(source: str) -> Iterator[str]:
    """Forbidden names that `from … import` would hide from `findings`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in full if name in FORBIDDEN | NEEDED.keys())


def test_what_is_read_from_outside_runs_no_code(root: Path, files: list[Path]) -> None:
    found = set()
    for file in files:
        if file.suffix == ".py" and file.parts[0] in ("nemo_dpo", "tools", "examples"):
            source = (root / file).read_text(encoding="utf-8")
            found |= {(str(file), name) for name in (*findings(source), *imported_alone(source))}
    assert found == AUDITED.keys()


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=safe)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, Loader=L)",
        "class A(pickle.Unpickler): ...",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
        "eval(x)",
    ],
)
def test_the_rule_sees(line: str) -> None:
    assert list(findings(line))


@pytest.mark.parametrize(
    "line", ["torch.load(f, weights_only=True)", "np.load(f)", "yaml.safe_load(f)", "model.eval()"]
)
def test_the_rule_lets_pass(line: str) -> None:
    assert not list(findings(line))


def test_the_rule_sees_names_imported_alone() -> None:
    assert list(imported_alone("from pickle import loads")) == ["pickle.loads"]
    assert list(imported_alone("from torch import load")) == ["torch.load"]
