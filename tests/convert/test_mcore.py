"""megatron-core's own loader, saver and GPTModel agree with the converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert import hf_to_nemo
from tests.convert.conftest import BASE, LLAMAS, save_model

ROOT = Path(__file__).resolve().parents[2]
CASES: dict[str, dict[str, Any]] = {
    "tied": LLAMAS["gqa_9_3_tied"],
    "head_dim_and_llama3_rope": {"head_dim": 24, **LLAMAS["llama3_rope"]},
    "all_biases_and_linear_rope": {**LLAMAS["all_biases"], **LLAMAS["linear_rope"]},
    "qwen2": {},
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What megatron-core finds in all cases, from one process: its imports take seconds."""
    from transformers import LlamaConfig, Qwen2Config

    root = tmp_path_factory.mktemp("mcore")
    for name, changes in CASES.items():
        config_class = Qwen2Config if name == "qwen2" else LlamaConfig
        save_model(root / name / "hf", config_class(**{**BASE, **changes}, eos_token_id=2))
        hf_to_nemo(root / name / "hf", root / f"{name}.nemo")
        archive.extract(root / f"{name}.nemo", root / name / "nemo")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "convert" / "mcore_probe.py"), *(str(root / name) for name in CASES)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_faces(findings: dict[str, Any], case: str) -> None:
    # fp32 on both sides in another order of summation; a wrong row order is off by the size of the logits
    assert findings[case]["largest_logit"] > 1
    assert findings[case]["max_difference"] < 2e-5 * findings[case]["largest_logit"]


@pytest.mark.parametrize("case", CASES)
def test_keys_shapes_and_values_are_those_that_megatron_core_saves(findings: dict[str, Any], case: str) -> None:
    assert findings[case]["same_keys"] and findings[case]["same_shapes"] and findings[case]["same_values"]


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_more_padding_loads_the_same_rows(findings: dict[str, Any], case: str) -> None:
    assert findings[case]["wider_keeps_rows"] and findings[case]["wider_pads_zeros"]
