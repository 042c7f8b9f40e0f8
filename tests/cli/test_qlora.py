"""A base in four bits: the run is the LoRA run on weights that were rounded to four bits beforehand."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_dpo.convert.adapter_nemo import read_adapter
from nemo_dpo.quantization.nf4 import Nf4Weight
from tests.cli.conftest import Inputs
from tests.cli.launch_support import error_line
from tests.cli.test_lora import (
    ALL,
    DIMENSIONS,
    PP,
    SAVED,
    TP,
    VPP,
    adapter_path,
    base_with,
    logged,
    lora_run,
    reference,
)
from tests.support.cli import Run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra qlora)"
)
NF4 = "model.peft.base_quantization=nf4"
ARGUMENTS = [*ALL, "model.optim.lr=0.003", "model.optim.eps=0.0001"]


@pytest.fixture(scope="module")
def rounded(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The same model, its linear layers unpacked from four bits."""

    def unpack(weights: dict[str, torch.Tensor]) -> None:
        for name, stacked in weights.items():
            if ".linear_" in name and name.endswith(".weight") and "layer_norm" not in name:
                weights[name] = torch.stack([Nf4Weight(layer).dequantize() for layer in stacked])

    return replace(inputs, nemo=base_with(inputs, tmp_path_factory.mktemp("rounded"), unpack))


@pytest.fixture(scope="module")
def expected(rounded: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return lora_run(rounded, tmp_path_factory.mktemp("run"), *ARGUMENTS)


@pytest.mark.parametrize(
    ("arguments", "ranks"), [([], 1), ([PP], 2), ([PP, VPP], 2), ([], 2), ([reference("cached")], 1)]
)
def test_four_bits_are_rounded_weights(
    inputs: Inputs, expected: Run, tmp_path: Path, arguments: list[str], ranks: int
) -> None:
    run = lora_run(inputs, tmp_path, *ARGUMENTS, NF4, *arguments, ranks=ranks)
    assert logged(run) == pytest.approx(logged(expected), rel=1e-5)
    ours, theirs = (read_adapter(adapter_path(each), DIMENSIONS).tensors for each in (run, expected))
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs) ** 0.5
    assert difference <= 1e-4 * sum(float(tensor.square().sum()) for tensor in theirs.values()) ** 0.5


def test_rounding_is_seen(inputs: Inputs, expected: Run, tmp_path: Path) -> None:
    """Else the comparison above would prove nothing."""
    run = lora_run(inputs, tmp_path, *ARGUMENTS)
    assert max(abs(a - b) for a, b in zip(logged(run), logged(expected), strict=True)) > 1e-3


@pytest.mark.parametrize("layout", [[TP], [TP, "model.sequence_parallel=true"]])
def test_tensor_parallel_ranks_pack_their_shares(
    inputs: Inputs, expected: Run, tmp_path: Path, layout: list[str]
) -> None:
    """A share of 32 columns cuts the blocks of 64 in two: other blocks, other rounding, of the same size."""
    run = lora_run(inputs, tmp_path, *ARGUMENTS, NF4, *layout, ranks=2)
    losses = run.series("train", "loss")
    assert losses[0] == pytest.approx(expected.series("train", "loss")[0], rel=2e-7)
    assert losses == pytest.approx(expected.series("train", "loss"), abs=0.05)


def test_a_damaged_base_is_refused_on_all_ranks(inputs: Inputs, tmp_path: Path) -> None:
    """A NaN in the last row of fc1, which the second rank alone packs."""

    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.decoder.layers.mlp.linear_fc1.weight"][2, -1, 0] = float("nan")

    base = base_with(inputs, tmp_path / "base", damage)
    words = [*ARGUMENTS, NF4, TP, f"pretrained_checkpoint.restore_from_path={base}"]
    run = lora_run(inputs, tmp_path / "run", *words, ranks=2, check=False)
    assert run.status == 2, run.output
    assert f"{base}: a weight of shape [128, 64] cannot be quantized" in error_line(run.output)


def test_resume(inputs: Inputs, tmp_path: Path) -> None:
    constant = [*ARGUMENTS, NF4, *SAVED, "model.optim.sched.name=constant"]
    whole = lora_run(inputs, tmp_path / "whole", *constant)
    lora_run(inputs, tmp_path / "run", *constant, "trainer.dpo.max_steps=4")
    other = lora_run(inputs, tmp_path / "run", *constant, TP, ranks=2, check=False)
    assert other.status == 2
    assert "quantization was nf4 at tensor parallel size 1 when" in other.output  # ranks pack their shares apart
    resumed = lora_run(inputs, tmp_path / "run", *constant)
    assert resumed.series("train", "loss") == whole.series("train", "loss")
