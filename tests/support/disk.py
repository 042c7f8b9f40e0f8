"""A full disk, as this process sees one."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow over `limit` bytes: writes fail as on a full disk (OSError).

    Not a fixture: it would still hold while pytest reports, and break pytest's own log where that is a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of `size` (mount's, as 5m) at `folder`; the test is skipped where this process may mount none."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"may not mount a small file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def enlarge(folder: Path, size: str) -> None:
    """Make a small disk a larger one."""
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
