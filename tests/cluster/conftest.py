"""A running cluster, one tiny model and its pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.launch_support import Inputs, make_inputs
from tests.support.slurm import Cluster, cluster, missing


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """What every run starts from."""
    return make_inputs(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="session")
def odd_inputs(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The same in a folder whose name has a space, a quote and letters that are not ASCII."""
    folder = tmp_path_factory.mktemp("Jo's données 训练")
    paths = (inputs.nemo, inputs.train, inputs.valid)
    for path in paths:
        (folder / path.name).symlink_to(path)
    return Inputs(*(folder / path.name for path in paths))


@pytest.fixture(scope="session", params=["loopback", "veth"])
def network(request: pytest.FixtureRequest) -> str:
    """The kind of network between the nodes."""
    return str(request.param)


@pytest.fixture(scope="session")
def slurm(network: str) -> Iterator[Cluster]:
    """Two nodes."""
    if reason := missing(network):
        pytest.skip(reason)
    with cluster(network) as running:
        yield running


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Of a run; its name needs quoting in a shell, in hydra and in srun's patterns."""
    return tmp_path / "résultats 5%j"
