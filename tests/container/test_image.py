"""The image is built for real on a plain base; it trains as its own user and as any other, and stops when told to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.launch_support import QUICK, ROOT, Inputs, losses, make_inputs, train
from tests.cluster.batch import Run, finished
from tests.container import images
from tests.support import slurm

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

IMAGE = "localhost/nemo_dpo"
SECRET = "not-for-the-image"


@pytest.fixture(scope="session", autouse=True)
def _possible() -> None:
    if reason := images.reason_to_skip():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, and beside them what a person's checkout may hold."""
    folder = tmp_path_factory.mktemp("context") / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("slurm/env.sh", ".env", "results/run/config.yaml", "examples/key.pem"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    return folder


@pytest.fixture(scope="session")
def image(context: Path) -> str:
    start = time.monotonic()
    images.build(context, IMAGE)
    print(f"built in {time.monotonic() - start:.0f} s, {images.buildah('images', '--format', '{{.Size}}', IMAGE)}")
    return IMAGE


@pytest.fixture(scope="session")
def box(image: str) -> Iterator[images.Box]:
    box = images.Box.of(image)
    yield box
    box.remove()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Readable by every user."""
    folder = tmp_path_factory.mktemp("inputs")
    inputs = make_inputs(folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return inputs


def run(box: images.Box, inputs: Inputs, results: Path, *options: str, user: str | None = None) -> list[str]:
    """The command that trains in the container, writing to `results`."""
    results.mkdir(exist_ok=True)
    results.chmod(0o777)
    words = ["python", "train_gpt_dpo.py", *inputs.arguments, f"exp_manager.explicit_log_dir={results}", *options]
    return box.command(words, [inputs.nemo.parent, results], user, ["OMP_NUM_THREADS=1"])


def test_nothing_private_is_in_it(box: images.Box) -> None:
    assert box.config["User"] == "10001"
    project = box.folder / "opt" / "nemo_dpo"
    held = [path for path in project.rglob("*") if path.is_file()]
    assert project / "nemo_dpo" / "launch.py" in held
    assert [path for path in held if SECRET in path.read_text(errors="ignore")] == []
    assert not (box.folder / "etc" / "pip.conf").exists() or not (box.folder / "etc" / "pip.conf").read_text()
    assert "pip.conf" not in images.buildah("inspect", "--type", "image", IMAGE)


def test_a_change_of_the_code_installs_nothing_again(context: Path, image: str) -> None:
    (context / "conf" / "new.yaml").write_text(f"# {uuid.uuid4()}\n")  # which no earlier build has seen
    steps = images.build(context, f"{IMAGE}-changed").split("STEP ")
    cached = [step for step in steps if "Using cache" in step]
    assert any("--editable" in step for step in cached), steps
    assert not any("COPY . ." in step for step in cached)


def test_the_bare_image_prints_the_help(box: images.Box) -> None:
    done = subprocess.run(box.command([]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ref_policy_kl_penalty" in done.stdout


@pytest.mark.parametrize("user", [None, "54321:54321"], ids=["its own user", "a user of the cluster"])
def test_it_trains_as_outside(box: images.Box, inputs: Inputs, tmp_path: Path, user: str | None) -> None:
    outside = train([*inputs.arguments, f"exp_manager.explicit_log_dir={tmp_path / 'outside'}"], tmp_path)
    assert outside.status == 0, outside.output
    done = subprocess.run(run(box, inputs, tmp_path / "inside", user=user), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The same versions on the same processor; another build of Python may sum the loss's few numbers otherwise.
    assert losses(tmp_path / "inside") == pytest.approx(losses(tmp_path / "outside"), rel=1e-6)
    trained = tmp_path / "inside" / "checkpoints" / "megatron_gpt.nemo"
    assert trained.stat().st_uid == int((user or "10001").partition(":")[0])


def test_stopping_the_container_saves(box: images.Box, inputs: Inputs, tmp_path: Path) -> None:
    """What `docker stop` does: TERM to process 1, from which two forked ranks must hear of it."""
    results = tmp_path / "results"
    command = run(box, inputs, results, "trainer.devices=2", "trainer.dpo.max_epochs=200")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    metrics = results / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    os.kill(first_process(process.pid), signal.SIGTERM)
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    (step,) = {json.loads(path.read_text())["step"] for path in results.glob("checkpoints/*/progress.json")}
    assert 0 < step < 600


def test_a_job_of_two_nodes_runs_in_it(box: images.Box, inputs: Inputs, tmp_path: Path) -> None:
    """The batch script with CONTAINER set, on a stand-in for pyxis that takes the image's folder."""
    if reason := slurm.missing():
        pytest.skip(reason)
    outside = train([*inputs.arguments, f"exp_manager.explicit_log_dir={tmp_path / 'outside'}"], tmp_path)
    assert outside.status == 0, outside.output
    job = Run(inputs, tmp_path / "inside")
    with slurm.cluster() as running:
        if reason := slurm.add_pyxis(running, tmp_path):
            pytest.skip(reason)
        settings = {"CONTAINER": str(box.folder), "PYTHON": "/usr/bin/python3"}
        number = job.submit(running, "train_gpt_dpo.sbatch", QUICK, nodes=2, tasks=1, **settings)
        finished(running, number, job)
    # Two ranks add the loss of their pairs in another order than one.
    assert losses(tmp_path / "inside") == pytest.approx(losses(tmp_path / "outside"), rel=1e-5)


def first_process(unshare: int) -> int:
    """The one that is process 1 inside."""
    return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])
