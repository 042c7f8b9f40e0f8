"""Every batch script through real Slurm, on two nodes, with both kinds of network between them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from nemo_dpo.training.run_log import METRICS_FILE, read_metrics
from tests.cli.launch_support import QUICK, ROOT, Inputs, losses
from tests.cluster.batch import Run, finished
from tests.support.cli import run_cli
from tests.support.slurm import Cluster, add_pyxis

SHARED = Path(os.environ.get("NEMO_DPO_SHARED", ROOT.parent / "shared"))

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

TP_2, PP_2 = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"


@pytest.fixture(scope="session")
def one_process(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the quick run in one process."""
    return losses(run_cli(inputs.arguments, tmp_path_factory.mktemp("one")).log_dir)


@pytest.mark.parametrize("layout", [TP_2, PP_2], ids=["TP 2 × DP 2", "PP 2 × DP 2"])
def test_layouts_train_to_the_numbers_of_one_process(
    slurm: Cluster, odd_inputs: Inputs, results: Path, one_process: dict[int, float], layout: str
) -> None:
    run = Run(odd_inputs, results)
    finished(slurm, run.submit(slurm, "train_gpt_dpo.sbatch", [*QUICK, layout]), run)
    # As tests/cli/test_equivalence.py has it: sums in another order, in fp32, over three updates.
    assert losses(results) == pytest.approx(one_process, rel=1e-5)
    assert "Layout(world=4" in run.said()


def test_a_chain_of_all_three_scripts(slurm: Cluster, odd_inputs: Inputs, results: Path, one_process: object) -> None:
    """Convert, cache, train: each waits for the one before it."""
    hf = odd_inputs.nemo.resolve().with_name("hf")
    nemo = results.with_name("converted é.nemo")
    run = Run(Inputs(nemo, odd_inputs.train, odd_inputs.valid), results)
    cached = [*QUICK, "model.dpo.reference.kind=cached"]
    words = ["convert_hf_to_nemo.py", f"--input_name_or_path={hf}", f"--output_path={nemo}", "--precision=32"]
    convert = run.submit(slurm, "convert.sbatch", words, nodes=1, tasks=1)
    fill = run.submit(slurm, "cache_reference.sbatch", cached, [f"--dependency=afterok:{convert}"], nodes=1)
    train = run.submit(slurm, "train_gpt_dpo.sbatch", cached, [f"--dependency=afterok:{fill}"])
    finished(slurm, train, run, seconds=600)
    assert [slurm.fact(job, "JobState") for job in (convert, fill)] == ["COMPLETED"] * 2
    assert losses(results) == pytest.approx(one_process, rel=1e-5)
    assert "reference log-probs of train found in" in (results / f"nemo_dpo-{train}_0.err").read_text()


def test_an_array_trains_a_run_for_each_number(
    slurm: Cluster, odd_inputs: Inputs, results: Path, tmp_path: Path
) -> None:
    """As the template of the settings has it."""
    settings = tmp_path / "env.sh"
    settings.write_text(
        "betas=(0.05 0.5)\n"
        'export RESULTS_DIR="$RESULTS_DIR ${betas[SLURM_ARRAY_TASK_ID]}"\n'
        'set -- "$@" "++model.dpo.ref_policy_kl_penalty=${betas[SLURM_ARRAY_TASK_ID]}"\n'
    )
    run = Run(odd_inputs, results)
    few = [*QUICK, "trainer.dpo.max_steps=2"]
    job = run.submit(slurm, "train_gpt_dpo.sbatch", few, ["--array=0-1"], nodes=1, tasks=1, NEMO_DPO_ENV=str(settings))
    for number, beta in enumerate((0.05, 0.5)):
        folder = results.with_name(f"{results.name} {beta}")
        finished(slurm, f"{job}_{number}", Run(odd_inputs, folder))
        assert len(losses(folder)) == 2
        assert f"ref_policy_kl_penalty: {beta}" in (folder / "run" / "config.yaml").read_text()


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["loopback"], indirect=True)
def test_a_refusal_fails_the_job_and_says_why(slurm: Cluster, odd_inputs: Inputs, results: Path) -> None:
    run = Run(odd_inputs, results)
    job = run.submit(slurm, "train_gpt_dpo.sbatch", ["model.global_batch_sise=4"])
    assert slurm.wait(job) == "FAILED"
    assert slurm.fact(job, "ExitCode") == "2:0"
    assert run.said().count("did you mean model.global_batch_size?") == 2, "one line a node"
    assert slurm.fact(job, "Restarts") == "0"


# --- containers: the flags of pyxis, on a stand-in that takes a folder for an image -----------------------------------


@pytest.fixture
def pyxis(slurm: Cluster, tmp_path: Path) -> None:
    """The folder / is the image, so that this host's python is in it."""
    if reason := add_pyxis(slurm, tmp_path):
        pytest.skip(reason)


@pytest.mark.usefixtures("pyxis")
@pytest.mark.parametrize("network", ["loopback"], indirect=True)
def test_with_the_flags_of_pyxis(slurm: Cluster, odd_inputs: Inputs, results: Path) -> None:
    """The only mounts at other places than outside are those of MOUNTS."""
    target = results.parent / "mounted here"
    target.mkdir()
    run = Run(replace_train(odd_inputs, target), results)
    job = run.submit(
        slurm,
        "train_gpt_dpo.sbatch",
        [*QUICK, "trainer.dpo.max_steps=2"],
        nodes=1,
        CONTAINER="/",
        MOUNTS=f"{odd_inputs.train.resolve().parent}:{target}",
    )
    finished(slurm, job, run)
    assert len(losses(results)) == 2


def replace_train(inputs: Inputs, folder: Path) -> Inputs:
    return Inputs(inputs.nemo, folder / inputs.train.name, inputs.valid)


def guides_script() -> str:
    """NeMo-Aligner's batch script, with the ends of lines that the guide's text has lost."""
    guides = [file for file in (SHARED / "seeds").glob("*.txt") if "#SBATCH" in file.read_text(encoding="utf-8")]
    if not guides:
        pytest.skip(f"NeMo-Aligner's guide is not in {SHARED / 'seeds'} (NEMO_DPO_SHARED names another place)")
    (line,) = [line for line in guides[0].read_text(encoding="utf-8").splitlines() if "#SBATCH" in line]
    text = line[line.index("#!/bin/bash") :]
    text = re.sub(r" (?=#SBATCH|mkdir |read -r|set \+x)|(?<!export) (?=[A-Z_]+=)", "\n", text)
    return text.replace("<<EOF ", "<<EOF\n").replace(" EOF srun", "\nEOF\nsrun").replace(" \\ ", " \\\n") + "\n"


@pytest.mark.usefixtures("pyxis")
@pytest.mark.parametrize("network", ["loopback"], indirect=True)
def test_the_script_of_nemo_aligners_guide(slurm: Cluster, inputs: Inputs, tmp_path: Path) -> None:
    """With its placeholders filled in, on one node of eight ranks, which its text allows."""
    results = tmp_path / "results"
    results.mkdir()
    placeholders = {
        "<<ACCOUNT NAME>>": "anybody",
        "<<PARTITION NAME>>": "main",
        "<<JOB NAME>>": "guide",
        "/path/to/nemo-aligner-repo": str(ROOT),
        "/path/to/megatron_gpt_sft.nemo": str(inputs.nemo),
        "/path/to/train_comparisons.jsonl": str(inputs.train),
        "/path/to/test_comparisons.jsonl": str(inputs.valid),
        "<<WANDB PROJECT>>": "dpo",
        "<<<CONTAINER>>>": "/",
        "/path/to/result_dir": str(results),
    }
    text = guides_script()
    for name, value in placeholders.items():
        assert name in text
        text = text.replace(name, value)
    script = tmp_path / "guide.sbatch"
    script.write_text(text)
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    more = {"WANDB_MODE": "offline", "PATH": python}
    job = slurm.submit("--nodes=1", f"--output={tmp_path / 'batch.txt'}", script, cwd=tmp_path, more=more)
    state = slurm.wait(job, 600)
    said = (tmp_path / "batch.txt").read_text() + (results / f"rm-{job}_0.err").read_text()
    assert state == "COMPLETED", said
    assert "Layout(world=8" in said
    rows = read_metrics(results / METRICS_FILE)
    assert [row["step"] for row in rows if "train/loss" in row] == [0], "one step holds all 24 pairs"
    (wandb,) = results.rglob("*.wandb")
    assert re.search(r"offline-run-", str(wandb))
