"""A real Slurm cluster of private processes on this host, for tests: munged, slurmctld and a slurmd for each node.

Every node has a host name and a process table of its own. On the network `loopback` all are one address; on `veth` each
has its own network, where "localhost" is another machine on every node.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "cluster"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def missing(network: str = "loopback") -> str | None:
    """Why no cluster can be started here, or None."""
    needed = [*PROGRAMS, "ip"] if network == "veth" else PROGRAMS
    # The daemons' folder is not always in the PATH of a user.
    absent = [program for program in needed if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge, iproute2)"
    if os.getuid() != 0:
        return "the cluster's namespaces need root"
    own = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True)
    return f"no namespaces here: {own.stderr.strip()}" if own.returncode else None


@dataclass(frozen=True)
class Cluster:
    """A running cluster; all its commands are given on its login machine."""

    environment: dict[str, str] = field(repr=False)
    jobs: list[str] = field(default_factory=list)

    def run(self, *command: str | Path, cwd: Path | None = None, more: Mapping[str, str] | None = None) -> str:
        """A client command's output; a failure fails the test."""
        words = [SCRIPTS / "enter.sh", *command]
        environment = {**self.environment, **(more or {})}
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str | Path, cwd: Path, more: Mapping[str, str] | None = None) -> str:
        """`sbatch` in `cwd`, with `more` in its environment → the job's number."""
        job = self.run("sbatch", "--parsable", *words, cwd=cwd, more=more)
        self.jobs.append(job)
        return job

    def fact(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState or Restarts."""
        found = re.search(rf"(?:^|\s){name}=(\S+)", self.run("scontrol", "show", "job", job, "-o"))
        assert found, name
        return found[1]

    def wait(self, job: str, seconds: float = 300, until: Callable[[], bool] | None = None) -> str:
        """Wait for the end of a job, or for `until` while it has not ended; returns its state."""
        end = time.monotonic() + seconds
        while True:
            state = self.fact(job, "JobState")
            if until and until():
                return state
            if state in ENDED:
                assert until is None, f"job {job} is {state}\n{self.run('scontrol', 'show', 'job', job)}"
                return state
            assert time.monotonic() < end, f"job {job} is {state} after {seconds} s"
            time.sleep(0.2)


@contextmanager
def cluster(network: str = "loopback", nodes: int = 2) -> Iterator[Cluster]:
    """A cluster of its own; what its jobs have started ends with it."""
    state = Path(tempfile.mkdtemp(prefix="slurm-cluster."))  # short: its path is part of a socket's
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_", "TORCHELASTIC_", "WANDB_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    own = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "TEST_CLUSTER_NET": network, "OMP_NUM_THREADS": "1"}
    environment = kept | own
    try:
        command = [SCRIPTS / "up.sh", str(nodes), state]
        up = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert up.returncode == 0, up.stderr
        exports = dict(re.findall(r"(\w+)=(\S+)", up.stdout))
        yield Cluster(environment | exports)
    finally:
        subprocess.run([SCRIPTS / "down.sh", state], env=environment, check=True, timeout=120)
        shutil.rmtree(state, ignore_errors=True)


def add_pyxis(running: Cluster, folder: Path) -> str | None:
    """Give srun the options of pyxis, by a stand-in built in `folder` that takes a folder for an image.

    Returns:
        Why it cannot be built here, or None.
    """
    library = folder / "pyxis.so"
    command = ["gcc", "-shared", "-fPIC", "-o", library, SCRIPTS / "pyxis_stand_in.c"]
    try:
        built = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "gcc is not installed"
    if built.returncode:
        return f"the stand-in for pyxis cannot be built (Debian: libslurm-dev): {built.stderr.splitlines()[0]}"
    configuration = Path(running.environment["TEST_CLUSTER_STATE"]) / "plugstack.conf.d" / "pyxis.conf"
    configuration.write_text(f"required {library}\n")
    return None
