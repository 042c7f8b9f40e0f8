"""A base in four bits learns what the same base in bf16 does: SmolLM2-135M, the repository's pairs.

Rounding the base to NF4 changes policy and reference alike; what is left of it in the loss is shown here, step by step.
Two runs of three minutes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]

PAIRS = Path(__file__).parents[2] / "examples" / "data"
STEPS = 60
