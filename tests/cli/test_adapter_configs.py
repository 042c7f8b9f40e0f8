"""conf/gpt_dpo_lora.yaml and conf/gpt_dpo_qlora.yaml as they are started: on a tiny Qwen2, one after the other."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from nemo_dpo.convert.adapter_nemo import read_adapter
from nemo_dpo.lora.file import AdapterFile
from nemo_dpo.lora.spec import Dimensions, LoraSpec, linears_of
from tests.cli.conftest import Inputs
from tests.model.model_cases import CASES, make_case
from tests.support.cli import Run, run_cli

DIMENSIONS = Dimensions(layers=4, hidden=64, ffn=128, heads=4, query_groups=2, head_channels=16, gated=True)


@pytest.fixture(scope="module")
def qwen(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the files leave open: checkpoint, pairs, and the sizes of a run of seconds."""
    kind, changes = CASES["qwen2_qkv_bias"]
    model = make_case(tmp_path_factory.mktemp("qwen"), kind, {**changes, "max_position_embeddings": 512})
    return [
        f"pretrained_checkpoint.restore_from_path={model.nemo}",
        f"model.data.data_prefix={{train: [{inputs.train}], validation: [{inputs.validation}]}}",
        "model.global_batch_size=8",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.dpo.limit_val_batches=1",
        "model.optim.lr=0.01",
        "exp_manager.plot_on_train_end=false",
    ]


@pytest.fixture(scope="module")
def lora(qwen: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    schedule = ["model.optim.sched.warmup_steps=0", "model.optim.sched.constant_steps=0"]
    return run_cli(["--config-name=gpt_dpo_lora", *qwen, *schedule], tmp_path_factory.mktemp("lora"))


def adapter(run: Run) -> Path:
    return run.log_dir / "checkpoints" / "megatron_gpt.nemo"


def trained(run: Run) -> AdapterFile:
    return read_adapter(adapter(run), DIMENSIONS)


def test_lora(lora: Run) -> None:
    assert trained(lora).spec == LoraSpec(linears_of(["all"]), rank=32, alpha=32.0)
    losses = lora.series("train", "loss")
    assert len(losses) == 4 and losses[0] == pytest.approx(math.log(2), rel=2e-7)
    assert abs(losses[-1] - math.log(2)) > 0.05


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_from_an_adapter_against_the_same_adapter(qwen: list[str], lora: Run, tmp_path: Path) -> None:
    start = [f"model.peft.restore_from_path={adapter(lora)}", "trainer.dpo.max_epochs=3"]
    run = run_cli(["--config-name=gpt_dpo_qlora", *qwen, *start], tmp_path)
    assert "NF4: 16 layers" in run.output
    assert [row["step"] for row in run.rows("train")] == [0, 2, 4, 6, 8]
    assert [row["step"] for row in run.rows("val")] == [0, 2, 4, 6, 8, 10]
    losses = run.series("train", "loss")
    # The policy starts at the adapter, which is its reference; against the base alone the loss would not be ln 2.
    assert losses[0] == pytest.approx(math.log(2), rel=2e-7) and run.series("train", "rewards_all_std")[0] == 0
    assert abs(losses[-1] - math.log(2)) > 0.05
    start, end = trained(lora), trained(run)
    assert end.spec == start.spec and end.base == start.base
    assert not any(torch.equal(end.tensors[name], start.tensors[name]) for name in start.tensors)
