"""A cache of log-probs and a resume know which adapters, on which base, they are of."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert.adapter_nemo import write_adapter
from nemo_dpo.lora.adapters import initial
from nemo_dpo.lora.file import AdapterFile
from tests.cli.conftest import Inputs
from tests.cli.launch_support import error_line
from tests.cli.test_equivalence import keys
from tests.cli.test_lora import DIMENSIONS, SAVED, SPEC, reference
from tests.support.cli import Run, run_cli

LORA = "model.peft.peft_scheme=lora"
NF4 = "model.peft.base_quantization=nf4"
SHAPE = {"target_modules": "[mlp,attention]", "layer_selection": "[4,2,3,1]", "alpha": 8, "adapter_dim": 8}


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra qlora)"
)


@pytest.fixture(scope="module")
def adapters(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter as supervised fine-tuning might leave it, the same under another alpha, and one of other numbers."""
    start, other = (initial(SPEC, DIMENSIONS, seed, b="xavier") for seed in (1, 2))
    tensors = {name: start(name) for name in SPEC.shapes(DIMENSIONS)}
    files = {
        "sft": AdapterFile(SPEC, tensors),
        "alpha": AdapterFile(replace(SPEC, alpha=32.0), tensors),
        "numbers": AdapterFile(SPEC, {name: other(name) for name in tensors}),
    }
    folder, config = tmp_path_factory.mktemp("adapters"), archive.read_model_config(inputs.nemo)
    for name, file in files.items():
        write_adapter(folder / f"{name}.nemo", file, config)
    return {name: folder / f"{name}.nemo" for name in files}


def fill(inputs: Inputs, cache: Path, log_dir: Path, *arguments: str, check: bool = True) -> Run:
    words = [LORA, reference("cached:frozen"), f"model.dpo.reference.cache_dir={cache}", *arguments]
    return run_cli([*inputs.arguments(), *words], log_dir, job="cache_reference", check=check)


@pytest.fixture(scope="module")
def cache(inputs: Inputs, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log-probs of the base with the SFT adapter."""
    folder = tmp_path_factory.mktemp("cache")
    fill(inputs, folder / "cache", folder / "run", f"model.peft.restore_from_path={adapters['sft']}")
    return folder / "cache"


def test_the_same_adapter_finds_its_log_probs(
    inputs: Inputs, adapters: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    copied = shutil.copy(adapters["sft"], tmp_path / "copied.nemo")
    # What the file says, in other words.
    shape = keys(**{f"peft.lora_tuning.{key}": value for key, value in SHAPE.items()})
    run = fill(inputs, cache, tmp_path / "run", f"model.peft.restore_from_path={copied}", *shape)
    assert "log-probs of train found" in run.output


@pytest.mark.parametrize("other", ["alpha", "numbers"])
def test_log_probs_of_another_adapter_are_refused(
    inputs: Inputs, adapters: dict[str, Path], cache: Path, tmp_path: Path, other: str
) -> None:
    run = fill(inputs, cache, tmp_path / "run", f"model.peft.restore_from_path={adapters[other]}", check=False)
    assert run.status == 2, run.output
    assert "adapter was " in error_line(run.output)


@needs_bitsandbytes
def test_log_probs_of_the_base_in_full_are_not_those_in_four_bits(
    inputs: Inputs, adapters: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    run = fill(inputs, cache, tmp_path / "run", f"model.peft.restore_from_path={adapters['sft']}", NF4, check=False)
    assert run.status == 2, run.output
    assert "base_quantization was none and is nf4" in error_line(run.output)


def test_with_adapter_off_there_is_no_second_copy_of_any_weight(inputs: Inputs, tmp_path: Path) -> None:
    """Tensors alive in the second step: base and adapter once, what Adam needs of the adapter, a batch."""
    small = keys(**{"peft.lora_tuning.adapter_dim": 1})
    weighed = {}
    for kind in ("adapter_off", "frozen"):
        words = [*inputs.arguments(), LORA, *small, reference(kind), "trainer.dpo.max_steps=2"]
        run_cli(words, tmp_path / kind, patches=["tests.cli.cached_probes:weigh_tensors"])
        weighed[kind] = json.loads((tmp_path / kind / "tensors.json").read_text())
    off, frozen = weighed["adapter_off"], weighed["frozen"]
    base, adapter = off["parameters"] - off["trained"], off["trained"]
    assert 0 < adapter < base / 20, "else what Adam keeps of the adapter could hide a copy of the base"
    assert off["live"] < 1.5 * base
    assert frozen["live"] - off["live"] == pytest.approx(adapter, rel=0.02)


@pytest.fixture(scope="module")
def stopped(inputs: Inputs, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of a run that trains a new adapter against the SFT adapter."""
    return run_cli(beside(inputs, adapters["sft"], 2), tmp_path_factory.mktemp("run"))


def beside(inputs: Inputs, adapter: Path, steps: int) -> list[str]:
    named = [f"+model.peft.frozen_adapters.sft={adapter}", reference("adapter:sft")]
    return [*inputs.arguments(), LORA, *named, *SAVED, f"trainer.dpo.max_steps={steps}"]


@pytest.mark.parametrize("other", ["alpha", "numbers"])
def test_another_adapter_beside_the_trained_one_does_not_resume(
    inputs: Inputs, adapters: dict[str, Path], stopped: Run, tmp_path: Path, other: str
) -> None:
    shutil.copytree(stopped.log_dir, tmp_path / "run", symlinks=True)
    run = run_cli(beside(inputs, adapters[other], 3), tmp_path / "run", check=False)
    assert run.status == 2, run.output
    assert "cannot resume: the start of adapter sft was " in error_line(run.output)
