"""The budget of CONTRIBUTING.md: functions of at most 60 lines, modules of at most 400, few levels of packages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FUNCTION_LINES = 60
MODULE_LINES = 400


@pytest.fixture(scope="module")
def sources(root: Path, files: list[Path]) -> dict[Path, str]:
    own = [file for file in files if file.suffix == ".py" and file.parts[0] in ("nemo_dpo", "tools", "examples")]
    return {file: (root / file).read_text(encoding="utf-8") for file in own}


def test_modules_are_short(sources: dict[Path, str]) -> None:
    long = {str(file): lines for file, text in sources.items() if (lines := len(text.splitlines())) > MODULE_LINES}
    assert long == {}


def test_functions_are_short(sources: dict[Path, str]) -> None:
    long = {
        f"{file}:{node.lineno} {node.name}": lines
        for file, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    }
    assert long == {}


def test_packages_are_flat(sources: dict[Path, str]) -> None:
    assert [str(file) for file in sources if file.parts[0] == "nemo_dpo" and len(file.parts) > 4] == []
