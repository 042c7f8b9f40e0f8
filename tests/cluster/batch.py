"""How the tests submit this repository's batch scripts, and where those write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_dpo.training.run_log import METRICS_FILE, read_metrics
from tests.cli.launch_support import ROOT, Inputs
from tests.support.slurm import Cluster


@dataclass(frozen=True)
class Run:
    """A training's folder and what its jobs are told of it."""

    inputs: Inputs
    results: Path

    @property
    def settings(self) -> dict[str, str]:
        """What a user writes into env.sh."""
        return {
            "NEMO_DPO_ENV": "/nonexistent",
            "PYTHON": sys.executable,
            "PRETRAINED_CHECKPOINT": str(self.inputs.nemo),
            "TRAIN_DATA": str(self.inputs.train),
            "VALID_DATA": str(self.inputs.valid),
            "RESULTS_DIR": str(self.results),
            "WANDB_MODE": "offline",
        }

    @property
    def log(self) -> Path:
        """What the batch scripts themselves say."""
        return self.results.parent / f"{self.results.name}.batch.txt"

    def submit(
        self,
        cluster: Cluster,
        script: str,
        arguments: Sequence[str],
        options: Sequence[str] = (),
        *,
        nodes: int = 2,
        tasks: int = 2,
        **more: str,
    ) -> str:
        """`sbatch slurm/<script>` from the repository's root, in another shape than the header's; the job's number."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        shape = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--time=60"]
        words = [*shape, f"--output={str(self.log).replace('%', '%%')}", *options, f"slurm/{script}", *arguments]
        return cluster.submit(*words, cwd=ROOT, more=self.settings | more)

    def said(self) -> str:
        """Everything that the batch scripts and the ranks have said."""
        files = [self.log, *sorted(self.results.glob("*-*_*.out")), *sorted(self.results.glob("*-*_*.err"))]
        return "".join(f"--- {file.name}\n{file.read_text()}" for file in files if file.exists())

    def last_step(self) -> int:
        """The newest step of training that has been logged, or -1."""
        path = self.results / METRICS_FILE
        rows = read_metrics(path) if path.exists() else []
        return max((row["step"] for row in rows if "train/loss" in row), default=-1)


def finished(cluster: Cluster, job: str, run: Run, seconds: float = 300) -> None:
    """Wait until a job has ended well."""
    state = cluster.wait(job, seconds)
    assert state == "COMPLETED", f"{state}\n{run.said()}"
