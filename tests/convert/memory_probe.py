"""Prints the peak memory of both directions of a conversion above what the process had before, in bytes.

Run as a process of its own: `python memory_probe.py FOLDER`, with FOLDER/tiny/hf and FOLDER/large/hf. The tiny one goes
first, so that imports are not counted.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

from nemo_dpo.convert import hf_to_nemo, nemo_to_hf


def resident(which: str) -> int:
    """VmRSS (now) or VmHWM (largest since `forget_peak`), in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{which}:")]
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(command: Callable[[], None]) -> int:
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    command()
    return resident("VmHWM") - before


def to_nemo(folder: Path, precision: str | None = None) -> int:
    return peak_of(lambda: hf_to_nemo(folder / "hf", folder / "model.nemo", overwrite=True, precision=precision))


def to_hf(folder: Path) -> int:
    return peak_of(lambda: nemo_to_hf(folder / "model.nemo", folder / "back", overwrite=True))


if __name__ == "__main__":
    tiny, large = (Path(sys.argv[1]) / part for part in ("tiny", "large"))
    for warm_up in (to_nemo, to_hf):
        warm_up(tiny)
    print(json.dumps({"bf16": to_nemo(large), "back": to_hf(large), "32": to_nemo(large, "32")}))
