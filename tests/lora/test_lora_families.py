"""A live adapter on every family, shared out over two ranks, computes what PEFT computes with its export."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert.adapter_nemo import write_adapter
from nemo_dpo.convert.adapter_peft import nemo_to_peft
from nemo_dpo.logprobs import response_logps
from nemo_dpo.lora.adapters import initial
from nemo_dpo.lora.file import AdapterFile
from nemo_dpo.lora.spec import LoraSpec, linears_of
from nemo_dpo.parallel.groups import Layout
from tests.lora.lora_cases import SEED, dimensions, logps_of_rank
from tests.model.model_cases import CASES, SIZES, Case, make_case, random_batches
from tests.support.ranks import run_ranks

FAMILIES = ("mistral_window", "qwen3", "gpt_neox", "gpt2", "gemma", "starcoder2", "nemotron")
SPEC = LoraSpec(linears_of(["all"]), rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: make_case(tmp_path_factory.mktemp(name), *CASES[name]) for name in FAMILIES}


@pytest.fixture(scope="module")
def found(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """Family → log-probs of the two micro-batches; all by one pair of processes."""
    nemos = {name: case.nemo for name, case in cases.items()}
    ranks = run_ranks(2, logps_of_rank, tmp_path_factory.mktemp("ranks"), nemos, Layout(2, tp=2), SPEC)
    return dict(ranks[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_pefts(cases: dict[str, Case], found: dict[str, list[Tensor]], tmp_path: Path, name: str) -> None:
    for ours, theirs in zip(found[name], by_peft(cases[name], tmp_path), strict=True):
        # Sums of up to 20 log-probs of about −6 in fp32: 1e-5 is left of 100; the adapter moves them by more than 1.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=2e-5)


def by_peft(case: Case, folder: Path) -> list[Tensor]:
    """In float64, from the adapter that the ranks start from, exported; checks that it matters."""
    from transformers import AutoModelForCausalLM

    config, sizes = archive.read_model_config(case.nemo), dimensions(case.nemo)
    start = initial(SPEC, sizes, SEED, b="xavier")
    file = AdapterFile(SPEC, {name: start(name) for name in SPEC.shapes(sizes)})
    write_adapter(folder / "adapter.nemo", file, config)
    nemo_to_peft(folder / "adapter.nemo", folder / "peft")
    base = AutoModelForCausalLM.from_pretrained(case.hf, dtype=torch.float64, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, folder / "peft", autocast_adapter_dtype=False).double().eval()
    found = []
    for batch in random_batches(SIZES):
        indices = (batch.response_positions, batch.targets, batch.response_segment, batch.num_responses)
        with torch.no_grad():
            found.append(response_logps(model(batch.tokens).logits, *indices))
            with model.disable_adapter():
                plain = response_logps(model(batch.tokens).logits, *indices)
        assert (found[-1] - plain).abs().max() > 1
    return found
