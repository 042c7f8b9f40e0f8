"""One job through real Slurm, as part of every test run; the others are in make test-cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.launch_support import QUICK, Inputs, losses
from tests.cluster.batch import Run, finished
from tests.support.cli import run_cli
from tests.support.slurm import Cluster


@pytest.mark.parametrize("network", ["loopback"], indirect=True)
def test_two_nodes_train_as_two_processes(
    slurm: Cluster, inputs: Inputs, odd_inputs: Inputs, results: Path, tmp_path: Path
) -> None:
    run = Run(odd_inputs, results)
    job = run.submit(slurm, "train_gpt_dpo.sbatch", QUICK, tasks=1)
    finished(slurm, job, run)
    whole = run_cli([*inputs.arguments, "trainer.devices=2"], tmp_path / "here")
    assert losses(results) == losses(whole.log_dir)
    assert (results / "checkpoints" / "megatron_gpt.nemo").is_file()
    names = {path.name for path in results.iterdir()}
    assert {f"nemo_dpo-{job}_0.out", f"nemo_dpo-{job}_1.err"} <= names
    assert not [name for name in names if name.startswith("requeue")]
    assert f"job {job}, start 1: 2 node(s) × 1 ranks, meeting at n1:" in run.log.read_text()
