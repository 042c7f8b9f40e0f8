"""Adapters of a run: what the configuration may say beside an adapter file, and what their start costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_dpo.checkpoint import archive
from nemo_dpo.config.peft import LoraTuningConfig, PeftConfig
from nemo_dpo.convert.adapter_nemo import write_adapter
from nemo_dpo.lora.adapters import initial
from nemo_dpo.lora.file import AdapterFile
from nemo_dpo.lora.spec import LoraSpec, linears_of
from tests.lora.lora_cases import dimensions
from tests.model.model_cases import make_case
from tests.support.ranks import run_ranks
from tests.training.adapter_cases import answers, costs

SPEC = LoraSpec(linears_of(["all"]), rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers, extracted."""
    return make_case(tmp_path_factory.mktemp("model")).nemo


def write(path: Path, spec: LoraSpec, nemo: Path) -> Path:
    start = initial(spec, dimensions(nemo), 1, b="xavier")
    tensors = {name: start(name) for name in spec.shapes(dimensions(nemo))}
    write_adapter(path, AdapterFile(spec, tensors), archive.read_model_config(nemo))
    return path


# What is set → how the message puts it, or None where it is what the file says.
ALL_LAYERS: dict[str, tuple[LoraTuningConfig, str | None]] = {
    "nothing": (LoraTuningConfig(), None),
    "the same in other words": (
        LoraTuningConfig(["mlp", "attention"], 4, 8.0, "nemo", layer_selection=[4, 3, 2, 1]),
        None,
    ),
    "rank": (LoraTuningConfig(adapter_dim=8), "has adapter_dim=4, which model.peft.lora_tuning.adapter_dim=8 contra"),
    "alpha": (LoraTuningConfig(alpha=4.0), "has alpha=8.0, which model.peft.lora_tuning.alpha=4.0 contradicts"),
    "variant": (LoraTuningConfig(variant="canonical"), "has variant=nemo, which model.peft.lora_tuning.variant=canon"),
    "targets": (
        LoraTuningConfig(target_modules=["mlp"]),
        "has target_modules=[attention_qkv, attention_dense, mlp_fc1, mlp_fc2], which "
        "model.peft.lora_tuning.target_modules=[mlp_fc1, mlp_fc2] contradicts",
    ),
    "layers": (
        LoraTuningConfig(layer_selection=[2]),
        "has layer_selection=null, which model.peft.lora_tuning.layer_selection=[2] contradicts",
    ),
}
SECOND_LAYER: dict[str, tuple[LoraTuningConfig, str | None]] = {
    "the same": (LoraTuningConfig(layer_selection=[2]), None),
    "another": (LoraTuningConfig(layer_selection=[3]), "has layer_selection=[2], which model.peft.lora_tuning.layer"),
    "all": (
        LoraTuningConfig(layer_selection=[1, 2, 3, 4]),
        "has layer_selection=[2], which model.peft.lora_tuning.layer_selection=null contradicts",
    ),
}


@pytest.mark.parametrize(("layers", "cases"), [(None, ALL_LAYERS), ((1,), SECOND_LAYER)], ids=["all layers", "one"])
def test_what_contradicts_the_file_is_refused_in_the_users_words(
    nemo: Path, tmp_path: Path, layers: tuple[int, ...] | None, cases: dict[str, tuple[LoraTuningConfig, str | None]]
) -> None:
    file = write(tmp_path / "adapter.nemo", replace(SPEC, layers=layers), nemo)
    (tmp_path / "ranks").mkdir()
    questions = {name: tuning for name, (tuning, _) in cases.items()}
    found = run_ranks(1, answers, tmp_path / "ranks", file, dimensions(nemo), questions)[0]
    for name, (_, message) in cases.items():
        assert (message or "accepted") in found[name], name


def test_each_adapter_is_read_or_drawn_and_hashed_once(nemo: Path, tmp_path: Path) -> None:
    """Also where the one that is trained on is the reference as well."""
    file = str(write(tmp_path / "adapter.nemo", SPEC, nemo))
    other = str(write(tmp_path / "other.nemo", replace(SPEC, rank=2), nemo))
    (tmp_path / "ranks").mkdir()
    runs = {
        "new": PeftConfig("lora", lora_tuning=LoraTuningConfig(["all"], 4)),
        "same": PeftConfig("lora", restore_from_path=file, frozen_adapters={"reference": file}),
        "two": PeftConfig("lora", restore_from_path=file, frozen_adapters={"reference": other}),
    }
    found = run_ranks(1, costs, tmp_path / "ranks", nemo, dimensions(nemo), runs)[0]
    assert found["new"] == {"drawn": len(SPEC.shapes(dimensions(nemo))), "hashed": 1}
    assert found["same"] == {"read": 1, "hashed": 1}
    assert found["two"] == {"read": 2, "hashed": 2}
