"""PEFT's adapters of every family: in and out again unchanged, and merged as PEFT merges them.

The log-probs of a live adapter, under tensor parallelism, are PEFT's: tests/lora/test_lora_families.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.convert import nemo_to_hf
from nemo_dpo.convert.adapter_nemo import dimensions_of, read_adapter, write_adapter
from nemo_dpo.convert.adapter_peft import import_peft, nemo_to_peft, peft_to_nemo
from nemo_dpo.convert.merge import merge_adapter
from nemo_dpo.lora.spec import LoraSpec
from tests.convert.adapter_cases import assert_same, random_adapter
from tests.convert.test_adapters_peft import base_of, content, edit_config, hf_model, save_adapter
from tests.model.expert_cases import MIXTRAL
from tests.model.model_cases import CASES, Case, make_case

# Case of tests/model → sets of target_modules; the last is part of a fused or of an ambiguous kind.
TARGETS: dict[str, list[Any]] = {
    "mistral_window": [["q_proj", "down_proj"]],
    "qwen3": ["all-linear"],
    "gpt_neox": ["all-linear", ["query_key_value"], ["dense", "dense_4h_to_h"]],
    "gpt2": ["all-linear", ["c_attn"], ["c_proj"], ["attn.c_proj"]],
    "gemma": [["q_proj", "v_proj", "gate_proj"]],
    "starcoder2": ["all-linear", ["c_fc", "o_proj"]],
    "nemotron": ["all-linear", ["k_proj", "up_proj"]],
    "mixtral": [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]],
}
MODELS = {**CASES, "mixtral": ("mixtral", MIXTRAL)}
FUSED = {"gpt_neox": "query_key_value", "gpt2": "c_attn"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: make_case(tmp_path_factory.mktemp(name), *MODELS[name]) for name in TARGETS}


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in TARGETS for target in TARGETS[name]])
def test_imported_and_exported_back_it_is_the_same(
    cases: dict[str, Case], tmp_path: Path, name: str, target: Any
) -> None:
    case = cases[name]
    model = save_adapter(case, tmp_path / "made", target_modules=target)
    peft_to_nemo(tmp_path / "made", base_of(case), tmp_path / "lora.nemo")
    nemo_to_peft(tmp_path / "lora.nemo", tmp_path / "back")
    assert content(tmp_path / "back")[0] == content(tmp_path / "made")[0]
    assert_same(content(tmp_path / "back")[1], content(tmp_path / "made")[1])

    merge_adapter(base_of(case), tmp_path / "lora.nemo", tmp_path / "merged.nemo")
    nemo_to_hf(tmp_path / "merged.nemo", tmp_path / "merged")
    expected, found = model.merge_and_unload().state_dict(), hf_model(tmp_path / "merged").state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        # The same two products of fp32 numbers of a size of 0.1, added up in another order.
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", FUSED)
def test_one_projection_for_q_k_and_v(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    """PEFT's one A is the one that q, k and v share here; three of them have no place in PEFT."""
    case = cases[name]
    config = archive.read_model_config(case.nemo)
    save_adapter(case, tmp_path / "made", target_modules=[FUSED[name]])
    file = import_peft(tmp_path / "made", config)
    assert file.spec == LoraSpec(("linear_qkv",), 4, 7.0, "nemo")
    made = content(tmp_path / "made")[1]
    (a,) = (tensor for key, tensor in made.items() if ".1." in key and "lora_A" in key)
    (b,) = (tensor for key, tensor in made.items() if ".1." in key and "lora_B" in key)
    assert torch.equal(file.tensors["layers.1.linear_qkv.a.q_k_v"], a)
    # GPT-2: query above key above value. GPT-NeoX: of each of 4 heads its 16 rows of query, of key, of value.
    rows = b.view(3, 64, 4) if name == "gpt2" else b.view(4, 3, 16, 4).transpose(0, 1).reshape(3, 64, 4)
    for part, expected in zip("qkv", rows, strict=True):
        assert torch.equal(file.tensors[f"layers.1.linear_qkv.b.{part}"], expected)

    three = random_adapter(LoraSpec(("linear_qkv",), 4, 2.0, "canonical"), config)
    write_adapter(tmp_path / "three.nemo", three, config)
    with pytest.raises(
        CheckpointError, match=f"{FUSED[name]} is one projection with one A in PEFT.*only .*variant=nemo"
    ):
        nemo_to_peft(tmp_path / "three.nemo", tmp_path / "refused")


def test_an_adapter_of_ours_names_the_projections_that_it_is_on(cases: dict[str, Case], tmp_path: Path) -> None:
    """GPT-2 has a c_proj in each of its two blocks."""
    config = archive.read_model_config(cases["gpt2"].nemo)
    named = {("linear_proj",): ["attn.c_proj"], ("linear_proj", "linear_fc2"): ["c_proj"]}
    for number, (linears, modules) in enumerate(named.items()):
        file = random_adapter(LoraSpec(linears, 4, 2.0, "nemo"), config)
        write_adapter(tmp_path / f"{number}.nemo", file, config)
        nemo_to_peft(tmp_path / f"{number}.nemo", tmp_path / str(number))
        written = content(tmp_path / str(number))[0]
        assert written["target_modules"] == modules and written["fan_in_fan_out"] is True


def test_adapters_of_experts_are_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    """Of PEFT, and of a `.nemo` whose base had an MLP of the same sizes."""
    mixtral, dense = (archive.read_model_config(cases[name].nemo) for name in ("mixtral", "mistral_window"))
    save_adapter(cases["mixtral"], tmp_path / "made", target_modules=["q_proj"])
    edit_config(tmp_path / "made", target_modules=["w1"])
    with pytest.raises(CheckpointError, match=r"names \['w1'\] of this base; adapters can be on \['k_proj', 'o_proj'"):
        import_peft(tmp_path / "made", mixtral)
    file = random_adapter(LoraSpec(("linear_qkv", "linear_fc2"), 4, 2.0, "nemo"), dense)
    write_adapter(tmp_path / "dense.nemo", file, dense)
    with pytest.raises(CheckpointError, match=r"'target_modules': .*'mlp_fc2'.*cannot be read for this base"):
        read_adapter(tmp_path / "dense.nemo", dimensions_of(mixtral))


def test_conv1d_may_be_said_or_left_unsaid(cases: dict[str, Case], tmp_path: Path) -> None:
    """PEFT finds it out by itself."""
    config = archive.read_model_config(cases["gpt2"].nemo)
    save_adapter(cases["gpt2"], tmp_path / "made", target_modules=["c_attn"])
    said = import_peft(tmp_path / "made", config)
    edit_config(tmp_path / "made", fan_in_fan_out=False)
    assert_same(dict(import_peft(tmp_path / "made", config).tensors), dict(said.tensors))
