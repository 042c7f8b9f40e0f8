"""Tracked files name no machine: no path of a host, no registry of packages, no token."""

from __future__ import annotations

import re
from pathlib import Path

# Every pattern has a class in brackets somewhere, so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:[w]ork|[r]oot|[f]arm|[h]ome|opt/[p]ypi)/",
    "a package registry": r"[p]ypi\.org|[f]iles\.pythonhosted|[d]ownload\.pytorch\.org|[d]eb\.debian\.org|[i]ndex-url",
    "a token": r"\b(?:[h]f|ghp)_[A-Za-z0-9]{20,}",
}
SCRATCH = re.compile(r"(?<![\w.])/[t]mp/")


def matches(pattern: str, text: str) -> list[str]:
    """Lines of `text` that contain `pattern`."""
    return [line.strip()[:120] for line in text.splitlines() if re.search(pattern, line)]


def test_no_tracked_file_names_a_machine(root: Path, files: list[Path]) -> None:
    found = []
    for file in files:
        text = (root / file).read_bytes().decode("utf-8", errors="ignore")
        found += [f"{file}: {what}: {line}" for what, pattern in FORBIDDEN.items() for line in matches(pattern, text)]
        if file.parts[0] != "tests":
            found += [f"{file}: a scratch folder: {line}" for line in matches(SCRATCH.pattern, text)]
    assert found == []


def test_the_patterns_match_what_they_are_for() -> None:
    slash = "/"
    assert matches(FORBIDDEN["a path of one machine"], f"see {slash}root{slash}x")
    assert not matches(FORBIDDEN["a path of one machine"], "https://example.org/work/list and a/home/b")
    assert matches(FORBIDDEN["a package registry"], "https://py" + "pi.org/simple")
    assert matches(FORBIDDEN["a token"], "h" + "f_" + "a" * 30)


def test_text_files_end_with_a_newline_and_have_no_carriage_returns(root: Path, files: list[Path]) -> None:
    kinds = {".py", ".md", ".toml", ".yaml", ".sh", ".sbatch", ".txt"}
    named = {"Makefile", "Dockerfile", "run"}
    for file in files:
        if (file.suffix in kinds or file.name in named) and "data" not in file.parts and (root / file).stat().st_size:
            content = (root / file).read_bytes()
            assert b"\r" not in content, file
            assert content.endswith(b"\n"), file
