"""Models that are no Llama through the command line: Pythia, whose layer is our own, and GPT-2 with its positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert import nemo_to_hf
from tests.cli.conftest import Inputs
from tests.cli.test_equivalence import OPTIMIZERS, SCHEDULE
from tests.model.model_cases import CASES, make_case
from tests.support.cli import run_cli

RECOMPUTE = {"granularity": "full", "method": "uniform", "num_layers": 1}
LAYOUTS = {
    "gpt_neox": [
        "model.tensor_model_parallel_size=2",
        "model.sequence_parallel=true",
        *(f"model.activations_checkpoint_{key}={value}" for key, value in RECOMPUTE.items()),
    ],
    "gpt2": ["model.pipeline_model_parallel_size=2"],
}
SHORT = [
    *SCHEDULE,
    *OPTIMIZERS["sgd"],
    "trainer.dpo.max_steps=3",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
    "exp_manager.hf_export_on_train_end=true",
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_what_one_does_and_export_it(inputs: Inputs, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    case = make_case(tmp_path / "start", *CASES[name])
    words = [*replace(inputs, nemo=tmp_path / "start" / "model.nemo").arguments(), *SHORT]
    one = run_cli([*words, "trainer.devices=1"], tmp_path / "one")
    two = run_cli([*words, "trainer.devices=2", *LAYOUTS[name]], tmp_path / "two")
    losses = one.series("train", "loss")
    assert len(losses) == 3 and abs(losses[-1] - losses[0]) > 0.01
    for metric in ("loss", "grad_norm"):  # fp32 in another order of summation, as in test_equivalence.py
        assert two.series("train", metric) == pytest.approx(one.series("train", metric), rel=1e-5)

    config = archive.read_model_config(tmp_path / "two" / "checkpoints" / "megatron_gpt.nemo")
    assert config["huggingface"]["config"]["model_type"] == CASES[name][0]
    nemo_to_hf(tmp_path / "two" / "checkpoints" / "megatron_gpt.nemo", tmp_path / "again")
    (exported,) = (path.parent for path in (tmp_path / "two").rglob("config.json"))
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        start, end, again = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
            for folder in (case.hf, exported, tmp_path / "again")
        )
    assert torch.equal(end, again) and (end - start).abs().max() > 0.01


REFUSED = {
    "an A each for q, k and v": (
        {},
        ["model.peft.peft_scheme=lora", "model.peft.lora_tuning.variant=canonical"],
        "h.0.attn.c_attn is one projection with one A in PEFT",
    ),
    "a model of no family": (
        {"normalization": "layernorm1p"},
        [],
        "no family computes this; it differs from gpt2 in zero_centered_norm=True",
    ),
}


@pytest.mark.parametrize(("keys", "words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_export_that_cannot_be_is_refused_at_the_start(
    inputs: Inputs, tmp_path: Path, keys: dict[str, object], words: list[str], message: str
) -> None:
    case = make_case(tmp_path / "start", *CASES["gpt2"])
    archive.write_model_config({**archive.read_model_config(case.nemo), **keys}, case.nemo)
    arguments = [*replace(inputs, nemo=case.nemo).arguments(), *SHORT, *words]
    run = run_cli(arguments, tmp_path / "run", check=False)
    assert run.status == 2 and message in run.output, run.output
    assert not (tmp_path / "run" / "checkpoints").exists()
