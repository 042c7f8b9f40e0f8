"""Shell scripts parse and pass shellcheck, and the batch scripts do what they say, with stand-ins for Slurm's programs.

tests/cluster runs them through Slurm itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" node7 node8; else echo "scontrol $*"; fi',
    # Each argument on a line of its own, then what the ranks see of the environment. PROGRESS: that of a stopped run.
    "srun": 'printf "%s\\n" "$@"; echo "MASTER=$MASTER_ADDR:$MASTER_PORT"; '
    '[ -z "${PROGRESS:-}" ] || echo "$PROGRESS" >"$NEMO_DPO_REQUEUE_FILE"; exit "${SRUN_EXIT:-0}"',
    "sleep": 'echo "sleep $1"',
}


@pytest.fixture(scope="module")
def scripts(root: Path, files: list[Path]) -> list[Path]:
    """The repository's own, without those of other projects that tests run."""
    suffixes, first_line = (".sh", ".sbatch", ".template"), b"#!/usr/bin/env bash"
    found = [f for f in files if f.suffix in suffixes or (root / f).read_bytes().startswith(first_line)]
    assert {Path(".ci/run"), Path("slurm/train_gpt_dpo.sbatch"), Path("slurm/env.sh.template")} <= set(found)
    return found


def test_shell_scripts_parse(root: Path, scripts: list[Path]) -> None:
    for script in scripts:
        parsed = subprocess.run(["bash", "-n", root / script], capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say(root: Path, scripts: list[Path]) -> None:
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=root, capture_output=True, text=True)
    assert checked.stdout == ""
    assert checked.returncode == 0, checked.stderr


@pytest.fixture
def job(tmp_path: Path, root: Path) -> dict[str, str]:
    """The environment of a batch script on node7 and node8, with recording stand-ins first in PATH."""
    for name, body in STAND_INS.items():
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
        "TRAIN_DATA": "/data/it's.jsonl",
        "VALID_DATA": "/data/valid.jsonl",
        "RESULTS_DIR": str(tmp_path / "results"),
    }


def submit(
    root: Path, environment: dict[str, str], *overrides: str, script: str = "train_gpt_dpo"
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(root / f"slurm/{script}.sbatch"), *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "program"),
    [("train_gpt_dpo", "examples/nlp/gpt/train_gpt_dpo.py"), ("cache_reference", "tools/data/cache_reference.py")],
)
def test_runs_get_places_layout_and_overrides(root: Path, job: dict[str, str], script: str, program: str) -> None:
    overrides = ["++model.dpo.ref_policy_kl_penalty=0.1", "exp_manager.name=two words"]
    done = submit(root, job | {"SLURM_RESTART_COUNT": "2"}, *overrides, script=script)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    expected = [
        f"{root}/{program}",
        "trainer.num_nodes=2",
        "trainer.devices=8",
        "pretrained_checkpoint.restore_from_path='/models/a b.nemo'",
        r"model.data.data_prefix={train: ['/data/it\'s.jsonl'], "
        "validation: ['/data/valid.jsonl'], test: ['/data/valid.jsonl']}",
        f"exp_manager.explicit_log_dir='{job['RESULTS_DIR']}'",
        "++model.dpo.ref_policy_kl_penalty=0.1",
        "exp_manager.name=two words",
        "MASTER=node7:22342",  # 20000 + the last digits of the job's number, and the start
    ]
    assert lines[lines.index(expected[0]) :] == expected
    assert not any(line.startswith("--container") for line in lines)
    assert Path(job["RESULTS_DIR"]).is_dir()


MOUNTED = {"/models:/models", "/data:/data", "/scratch:/s"}


def test_pyxis_mounts_what_a_container_needs(root: Path, job: dict[str, str]) -> None:
    done = submit(root, job | {"CONTAINER": "/images/x.sqsh", "MOUNTS": "/scratch:/s"})
    assert "--container-image=/images/x.sqsh" in done.stdout.splitlines()
    (mounts,) = [line for line in done.stdout.splitlines() if line.startswith("--container-mounts=")]
    own = {f"{folder}:{folder}" for folder in (root, job["RESULTS_DIR"])}
    assert set(mounts.removeprefix("--container-mounts=").split(",")) == MOUNTED | own


def test_apptainer_gets_the_same_mounts(root: Path, job: dict[str, str]) -> None:
    container = {"CONTAINER": "/images/x.sif", "CONTAINER_RUNTIME": "apptainer", "MOUNTS": "/scratch:/s"}
    lines = submit(root, job | container).stdout.splitlines()
    begin = lines.index("apptainer")
    assert [*lines[begin : begin + 4], *lines[begin + 5 : begin + 7]] == (
        ["apptainer", "exec", "--nv", "--bind", "/images/x.sif", "bash"]
    )
    assert set(lines[begin + 4].split(",")) >= MOUNTED


def test_what_cannot_be_run_in_a_container_is_refused(root: Path, job: dict[str, str]) -> None:
    other = submit(root, job | {"CONTAINER": "x", "CONTAINER_RUNTIME": "docker"})
    assert (other.returncode, "neither pyxis nor apptainer" in other.stderr) == (2, True)
    comma = submit(root, job | {"CONTAINER": "x", "TRAIN_DATA": "/data/a,b/train.jsonl"})
    assert (comma.returncode, "paths with a comma or a colon" in comma.stderr) == (2, True)


def test_batch_script_ends_with_sruns_exit_code(root: Path, job: dict[str, str]) -> None:
    assert submit(root, job | {"SRUN_EXIT": "9"}).returncode == 9


def test_batch_script_names_a_missing_or_relative_setting(root: Path, job: dict[str, str]) -> None:
    relative = submit(root, job | {"VALID_DATA": "valid.jsonl"})
    assert (relative.returncode, "VALID_DATA=valid.jsonl is not an absolute path" in relative.stderr) == (2, True)
    del job["TRAIN_DATA"]
    missing = submit(root, job)
    assert (missing.returncode, "TRAIN_DATA is not set" in missing.stderr) == (2, True)


def test_batch_script_reads_the_settings_file_which_may_add_arguments(
    root: Path, job: dict[str, str], tmp_path: Path
) -> None:
    settings = tmp_path / "env.sh"
    settings.write_text('export VALID_DATA=/data/other.jsonl\nset -- "$@" "b=two words"\n')
    done = submit(root, job | {"NEMO_DPO_ENV": str(settings)}, "a=1")
    assert "validation: ['/data/other.jsonl']" in done.stdout
    assert "\na=1\nb=two words\n" in done.stdout


def test_converters_run_in_one_task(root: Path, job: dict[str, str]) -> None:
    done = submit(root, job, "convert_hf_to_nemo.py", "--output_path=/models/b c.nemo", script="convert")
    lines = done.stdout.splitlines()
    assert lines[lines.index(f"{root}/tools/convert/convert_hf_to_nemo.py") + 1] == "--output_path=/models/b c.nemo"
    unknown = submit(root, job, "convert_hf_to_neemo.py", script="convert")
    assert (unknown.returncode, "no such program" in unknown.stderr) == (2, True)


# --- requeueing -------------------------------------------------------------------------------------------------------

REQUEUED = "scontrol requeue 31234"


def test_a_run_that_stopped_in_time_is_requeued(root: Path, job: dict[str, str]) -> None:
    done = submit(root, job | {"PROGRESS": "step 7"})
    assert REQUEUED in done.stdout.splitlines()
    assert "sleep 300" in done.stdout, "until Slurm ends it"
    assert done.returncode == 2, "Slurm has not"
    assert not (Path(job["RESULTS_DIR"]) / "requeue-31234").exists()


def test_a_run_that_ended_or_failed_is_not(root: Path, job: dict[str, str]) -> None:
    assert REQUEUED not in submit(root, job | {"PROGRESS": "step 7", "SRUN_EXIT": "1"}).stdout
    # What that start left is none of the next one's.
    assert REQUEUED not in submit(root, job).stdout
    assert REQUEUED not in submit(root, job | {"SRUN_EXIT": "1"}).stdout


def test_requeueing_ends_without_progress(root: Path, job: dict[str, str]) -> None:
    """Two restarts that come no further are one too many for REQUEUE_LIMIT=2; one that does starts the count again."""

    def is_requeued(progress: str) -> bool:
        done = submit(root, job | {"PROGRESS": progress, "REQUEUE_LIMIT": "2"})
        if REQUEUED not in done.stdout:
            assert f"2 restarts in a row ended where the one before had ({progress})" in done.stderr
            assert done.returncode == 2
        return REQUEUED in done.stdout

    steps = ["step 4", "step 4", "step 9", "step 9", "step 9", "step 12"]
    assert [is_requeued(step) for step in steps] == [True, True, True, True, False, True]
