"""Run the real command line in forked processes that have already imported everything.

A fork server imports the product once; each run is a fork of it (and the run's ranks are forks of that), so a run of
two ranks costs about two seconds instead of twenty.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_dpo.training.run_log import METRICS_FILE, read_metrics

CONF = Path(__file__).parents[2] / "conf"


@dataclass(frozen=True)
class Run:
    """What a command did."""

    status: int
    output: str
    log_dir: Path

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl that belong to `split`, without its prefix."""
        prefix = f"{split}/"
        rows = read_metrics(self.log_dir / METRICS_FILE)
        return [
            {
                "step": row["step"],
                **{name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)},
            }
            for row in rows
            if any(name.startswith(prefix) for name in row)
        ]

    def series(self, split: str, name: str) -> list[float]:
        """One metric over the steps."""
        return [row[name] for row in self.rows(split)]


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])


def run_cli(
    arguments: Sequence[str],
    log_dir: Path,
    *,
    check: bool = True,
    timeout: float = 180,
    patches: Sequence[str] = (),
    job: str = "train",
) -> Run:
    """Run train_gpt_dpo with `arguments`; a status other than 0 fails the test unless `check` is false.

    Args:
        patches: names of functions `module:function` that the process calls before the run, to watch or break it.
        job: the function of nemo_dpo.app; train_gpt_dpo's unless given.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    output = log_dir / "output.txt"
    everything = [f"exp_manager.explicit_log_dir={log_dir}", "exp_manager.create_tensorboard_logger=false", *arguments]
    process = _context.Process(target=_child, args=(everything, str(output), list(patches), job))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.terminate()
        process.join()
        raise AssertionError(f"no end after {timeout} s:\n{output.read_text()[-4000:]}")
    run = Run(int(process.exitcode or 0), output.read_text(), log_dir)
    if check:
        assert run.status == 0, run.output[-6000:]
    return run


def _child(arguments: list[str], output: str, patches: list[str], job: str) -> None:
    import importlib

    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train_gpt_dpo.py", *arguments]
    for name in [name for name in os.environ if name.startswith("SLURM_")]:  # where the tests run is no matter
        del os.environ[name]
    for patch in patches:
        module, function = patch.split(":")
        getattr(importlib.import_module(module), function)()
    from nemo_dpo.launch import main

    status = main(CONF, "gpt_dpo", job, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
