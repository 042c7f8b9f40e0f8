"""setup.py, constraints.txt and the Makefile agree with each other and name no package that must not be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def lists(root: Path) -> dict[str, object]:
    """The literal lists REQUIRES and EXTRAS of setup.py."""
    tree = ast.parse((root / "setup.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    return {n.targets[0].id: ast.literal_eval(n.value) for n in assigned if n.targets[0].id in ("REQUIRES", "EXTRAS")}


@pytest.fixture(scope="module")
def requirements(lists: dict) -> list[Requirement]:
    return [Requirement(line) for line in lists["REQUIRES"] + [r for extra in lists["EXTRAS"].values() for r in extra]]


@pytest.fixture(scope="module")
def constraints(root: Path) -> dict[str, Requirement]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pinned_version(requirement: Requirement) -> str:
    """The version of a line `name==version`."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return specifier.version


def test_no_package_that_only_shares_a_name_with_nvidias(requirements: list[Requirement], lists: dict) -> None:
    names = {canonicalize_name(requirement.name) for requirement in requirements}
    assert not names & {"apex", "transformer-engine", "pytorch-lightning"}
    assert lists["EXTRAS"]["gpu"] == []


def test_every_constraint_is_a_requirement_and_lies_in_its_range(
    requirements: list[Requirement], constraints: dict[str, Requirement]
) -> None:
    required = {canonicalize_name(requirement.name) for requirement in requirements}
    assert set(constraints) <= required
    for requirement in requirements:
        pinned = constraints.get(canonicalize_name(requirement.name))
        if pinned is not None:
            assert requirement.specifier.contains(pinned_version(pinned)), requirement


def test_megatron_core_can_be_installed_on_every_supported_python(requirements: list[Requirement]) -> None:
    lines = [requirement for requirement in requirements if requirement.name == "megatron-core"]
    for python in ("3.11", "3.12", "3.13"):
        assert sum(line.marker.evaluate({"python_version": python}) for line in lines if line.marker) == 1


def test_makefile_and_dockerfile_install_the_same_torch(root: Path, requirements: list[Requirement]) -> None:
    makefile = re.search(r"^TORCH\s+\?= (\S+)$", (root / "Makefile").read_text(encoding="utf-8"), re.M)
    dockerfile = re.search(r"^ARG TORCH=(\S+)$", (root / "Dockerfile").read_text(encoding="utf-8"), re.M)
    assert makefile and dockerfile and makefile[1] == dockerfile[1]
    (torch,) = [requirement for requirement in requirements if requirement.name == "torch"]
    assert torch.specifier.contains(pinned_version(Requirement(makefile[1])))
