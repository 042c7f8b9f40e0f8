"""Shell scripts parse, and the batch script hands srun the right command, with stand-ins for Slurm's programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SLURM_PROGRAMS = {
    "scontrol": "printf '%s\\n' node7 node8",
    # Each argument on a line of its own, then what the ranks see of the environment.
    "srun": 'printf "%s\\n" "$@"; echo "MASTER=$MASTER_ADDR:$MASTER_PORT"; exit "${SRUN_EXIT:-0}"',
}


def test_shell_scripts_parse(root: Path, files: list[Path]) -> None:
    suffixes, first_line = (".sh", ".sbatch", ".template"), b"#!/usr/bin/env bash"
    scripts = [f for f in files if f.suffix in suffixes or (root / f).read_bytes().startswith(first_line)]
    assert {Path(".ci/run"), Path("slurm/train_gpt_dpo.sbatch"), Path("slurm/env.sh.template")} <= set(scripts)
    for script in scripts:
        parsed = subprocess.run(["bash", "-n", root / script], capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr


@pytest.fixture
def job(tmp_path: Path, root: Path) -> dict[str, str]:
    """The environment of a batch script on node7 and node8, with recording stand-ins first in PATH."""
    for name, body in SLURM_PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_JOB_ID": "31234",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS_PER_NODE": "8",
        "NEMO_DPO_ENV": "/nonexistent",
        "PRETRAINED_CHECKPOINT": "/models/a b.nemo",
        "TRAIN_DATA": "/data/train.jsonl",
        "VALID_DATA": "/data/valid.jsonl",
        "RESULTS_DIR": str(tmp_path / "results"),
    }


def submit(root: Path, environment: dict[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    script = [str(root / "slurm/train_gpt_dpo.sbatch"), *overrides]
    return subprocess.run(["bash", *script], env=environment, capture_output=True, text=True)


def test_batch_script_passes_places_layout_and_overrides(root: Path, job: dict[str, str]) -> None:
    done = submit(root, job, "++model.dpo.ref_policy_kl_penalty=0.1", "exp_manager.name=two words")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    expected = [
        "trainer.num_nodes=2",
        "trainer.devices=8",
        "pretrained_checkpoint.restore_from_path=/models/a b.nemo",
        "model.data.data_prefix={train: [/data/train.jsonl], "
        "validation: [/data/valid.jsonl], test: [/data/valid.jsonl]}",
        f"exp_manager.explicit_log_dir={job['RESULTS_DIR']}",
        "++model.dpo.ref_policy_kl_penalty=0.1",
        "exp_manager.name=two words",
        "MASTER=node7:21234",
    ]
    start = lines.index(expected[0])
    assert lines[start:] == expected
    assert not any(line.startswith("--container") for line in lines)
    assert Path(job["RESULTS_DIR"]).is_dir()


def test_batch_script_mounts_what_a_container_needs(root: Path, job: dict[str, str]) -> None:
    done = submit(root, job | {"CONTAINER": "/images/x.sqsh", "MOUNTS": "/scratch:/s"})
    assert "--container-image=/images/x.sqsh" in done.stdout.splitlines()
    (mounts,) = [line for line in done.stdout.splitlines() if line.startswith("--container-mounts=")]
    assert set(mounts.removeprefix("--container-mounts=").split(",")) == {
        f"{root}:{root}",
        f"{job['RESULTS_DIR']}:{job['RESULTS_DIR']}",
        "/models:/models",
        "/data:/data",
        "/scratch:/s",
    }


def test_batch_script_ends_with_sruns_exit_code(root: Path, job: dict[str, str]) -> None:
    assert submit(root, job | {"SRUN_EXIT": "9"}).returncode == 9


def test_batch_script_names_a_missing_setting(root: Path, job: dict[str, str]) -> None:
    del job["TRAIN_DATA"]
    done = submit(root, job)
    assert done.returncode != 0
    assert "TRAIN_DATA" in done.stderr


def test_batch_script_reads_the_settings_file(root: Path, job: dict[str, str], tmp_path: Path) -> None:
    settings = tmp_path / "env.sh"
    settings.write_text("export VALID_DATA=/data/other.jsonl\n")
    done = submit(root, job | {"NEMO_DPO_ENV": str(settings)})
    assert "validation: [/data/other.jsonl]" in done.stdout
