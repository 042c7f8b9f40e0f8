"""Neither the process that prepares a data file nor those that open it hold it in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.memory_probe import rank_of_a_run
from tests.support.ranks import run_ranks

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
def test_memory_of_every_rank_on_a_million_lines(tmp_path: Path) -> None:
    lines = 1_000_000
    file = generate(tmp_path / "x.jsonl", lines, repeat=3)
    assert file.stat().st_size > 300e6
    for name in ("ranks", "log"):
        (tmp_path / name).mkdir()
    found = run_ranks(2, rank_of_a_run, tmp_path / "ranks", file, tmp_path / "log", timeout=600)
    assert [sum(rank[part] for rank in found) for part in ("trained", "validated")] == [lines] * 2
    # Rank 0 has some 40 bytes a pair while it makes the report. Each rank keeps an epoch's order, 8 bytes a pair.
    first, second = (rank["growth_mb"] for rank in found)
    assert first < 70
    assert second < 25
