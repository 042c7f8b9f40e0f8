"""Neither the process that prepares a data file nor those that open it hold it in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("memory_probe.py")


def generate(path: Path, lines: int, repeat: int) -> Path:
    """`lines` different pairs of about 85 × repeat bytes."""
    with path.open("w") as stream:
        for i in range(lines):
            prompt, chosen, rejected = (
                f"{kind} number {i:09d} of a long file " * repeat for kind in ("ask", "yes", "no!")
            )
            stream.write(
                f'{{"prompt": "{prompt}", "chosen_response": "{chosen}A", "rejected_response": "{rejected}B"}}\n'
            )
    return path


def probe(task: str, file: Path, cache: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, str(PROBE), task, str(file), str(cache), *more]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_memory_on_fifty_thousand_lines(tmp_path: Path) -> None:
    file = generate(tmp_path / "x.jsonl", 50_000, repeat=10)
    assert file.stat().st_size > 45e6
    prepared = probe("prepare", file, tmp_path / "cache")
    opened = probe("open", file, tmp_path / "cache")
    assert prepared["pairs"] == opened["pairs"] == 50_000
    # A chunk of text and tokens at a time, and 28 bytes a pair for the report; the epoch's order takes 8 a pair.
    assert prepared["growth_mb"] < 25
    assert opened["growth_mb"] < 10
    holding = probe("prepare", file, tmp_path / "other", "hold")
    assert holding["growth_mb"] > 45, "the probe sees a file that is held"


@pytest.mark.slow
def test_memory_on_a_million_lines(tmp_path: Path) -> None:
    file = generate(tmp_path / "x.jsonl", 1_000_000, repeat=3)
    assert file.stat().st_size > 300e6
    prepared = probe("prepare", file, tmp_path / "cache")
    opened = probe("open", file, tmp_path / "cache")
    assert prepared["pairs"] == opened["pairs"] == 1_000_000
    assert prepared["growth_mb"] < 100
    assert opened["growth_mb"] < 30
