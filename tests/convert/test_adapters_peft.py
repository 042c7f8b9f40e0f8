"""Adapters made by PEFT itself: imported and exported back unchanged, refused where they cannot be expressed.

And the meaning: PEFT's forward pass on an exported adapter is that of the merged model.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.fingerprint import weights_hash
from nemo_dpo.checkpoint.weights import Chunk, read_weights
from nemo_dpo.convert import hf_to_nemo, nemo_to_hf, run
from nemo_dpo.convert.adapter_nemo import dimensions_of, read_adapter, write_adapter
from nemo_dpo.convert.adapter_peft import import_peft, nemo_to_peft, peft_to_nemo
from nemo_dpo.convert.merge import merge_adapter
from nemo_dpo.lora.spec import LoraSpec
from tests.convert.adapter_cases import ALL, assert_same, entries, random_adapter
from tests.convert.test_cli import tool
from tests.model.model_cases import CASES, Case, make_case, random_tokens

SHARED = Path(os.environ.get("NEMO_DPO_SHARED", Path(__file__).resolve().parents[3] / "shared"))
SMOLLM2 = {
    "mcore_gpt": True,
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "position_embedding_type": "rope",
    "num_layers": 30,
    "hidden_size": 576,
    "ffn_hidden_size": 1536,
    "num_attention_heads": 9,
    "num_query_groups": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "bias": False,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Name → arguments of PEFT's LoraConfig.
MADE: dict[str, dict[str, Any]] = {
    "q and v, the most common": {"target_modules": ["q_proj", "v_proj"]},
    "attention": {"target_modules": ATTENTION, "lora_dropout": 0.1},
    "every projection": {"target_modules": "all-linear"},
    "gate alone": {"target_modules": ["gate_proj"]},
    "a path": {"target_modules": ["self_attn.k_proj", "mlp.up_proj"]},
    "a regular expression": {"target_modules": r".*\.layers\.[13]\.(self_attn\.o_proj|mlp\.down_proj)"},
    "some layers": {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0, 3]},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": 2},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "down_proj"]},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny Llama with grouped queries."""
    return make_case(tmp_path_factory.mktemp("base"), *CASES["gqa_tied"])


def base_of(case: Case) -> Path:
    return case.nemo.with_name("model.nemo")


def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def save_adapter(case: Case, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PEFT adapter with random A and B, saved by PEFT; returns PEFT's model."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **options})
    torch.manual_seed(1)
    model = peft.get_peft_model(hf_model(case.hf, dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def content(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a PEFT folder."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    from safetensors.torch import save_file

    tensors = content(folder)[1]
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", MADE.values(), ids=MADE.keys())
def test_imported_and_exported_back_it_is_the_same(
    case: Case, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    save_adapter(case, tmp_path / "made", dtype, **options)
    peft_to_nemo(tmp_path / "made", base_of(case), tmp_path / "lora.nemo")
    nemo_to_peft(tmp_path / "lora.nemo", tmp_path / "back")
    (config, tensors), (config_back, tensors_back) = content(tmp_path / "made"), content(tmp_path / "back")
    assert config_back == config
    assert_same(tensors_back, tensors)
    assert entries(tmp_path) == {"made", "lora.nemo", "back"}
    assert entries(tmp_path / "back") == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_oracles_adapter_for_smollm2(tmp_path: Path) -> None:
    source = SHARED / "data" / "oracle" / "lora_init"
    if not source.is_dir():
        pytest.skip(f"{source} is not there; NEMO_DPO_SHARED names the folder that has it")
    file = import_peft(source, SMOLLM2)
    assert (file.spec.scale, file.spec.variant, file.spec.layers) == (2.0, "canonical", None)
    assert file.spec.linears == ("linear_qkv", "linear_proj")
    write_adapter(tmp_path / "lora.nemo", file, SMOLLM2)
    nemo_to_peft(tmp_path / "lora.nemo", tmp_path / "back")
    assert content(tmp_path / "back")[0] == content(source)[0]
    assert_same(content(tmp_path / "back")[1], content(source)[1])


def test_what_a_peft_adapter_becomes(case: Case, tmp_path: Path) -> None:
    save_adapter(case, tmp_path / "made", target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2])
    peft_to_nemo(tmp_path / "made", base_of(case), tmp_path / "lora.nemo")
    file = read_adapter(tmp_path / "lora.nemo", dimensions_of(archive.read_model_config(case.nemo)))
    assert file.spec == LoraSpec(("linear_qkv",), 4, 7.0, "canonical", (1, 2))
    assert file.base == weights_hash(case.nemo / archive.MODEL_WEIGHTS)
    made = content(tmp_path / "made")[1]
    name = "base_model.model.model.layers.2.self_attn.{}_proj.lora_{}.weight"
    for part in "qv":
        assert torch.equal(file.tensors[f"layers.2.linear_qkv.a.{part}"], made[name.format(part, "A")])
        assert torch.equal(file.tensors[f"layers.2.linear_qkv.b.{part}"], made[name.format(part, "B")])
    assert not file.tensors["layers.2.linear_qkv.a.k"].any() and not file.tensors["layers.2.linear_qkv.b.k"].any()


def test_rank_stabilised_scaling(case: Case, tmp_path: Path) -> None:
    save_adapter(case, tmp_path / "made", target_modules=["q_proj"], use_rslora=True, r=4, lora_alpha=7)
    file = import_peft(tmp_path / "made", archive.read_model_config(case.nemo))
    assert file.spec.scale == 7 / 4**0.5


def test_an_adapter_of_another_run_gets_a_config_of_its_own(case: Case, tmp_path: Path) -> None:
    """Trained on from an imported one with another rank: what was imported no longer describes it."""
    config = archive.read_model_config(case.nemo)
    save_adapter(case, tmp_path / "made", target_modules=["q_proj", "v_proj"])
    imported = import_peft(tmp_path / "made", config)
    write_adapter(
        tmp_path / "lora.nemo",
        replace(random_adapter(replace(imported.spec, rank=2), config), peft=imported.peft),
        config,
    )
    nemo_to_peft(tmp_path / "lora.nemo", tmp_path / "back")
    written, tensors = content(tmp_path / "back")
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (2, 7, ["k_proj", "q_proj", "v_proj"])
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape == (2, 64)


# fp32: the merged weights round W + scale·B·A once, PEFT adds two products; logits are of a size of about 10.
LOGITS = {"atol": 1e-4, "rtol": 1e-5}


@pytest.mark.parametrize("variant", ["nemo", "canonical"])
@pytest.mark.parametrize("name", ["gqa_tied", "qwen2_qkv_bias", "untied_head_dim_not_hidden_over_heads"])
def test_pefts_forward_is_that_of_the_merged_model(tmp_path: Path, name: str, variant: str) -> None:
    case = make_case(tmp_path, *CASES[name])
    config = archive.read_model_config(case.nemo)
    file = random_adapter(LoraSpec(ALL, 4, 2.0, variant), config, base=weights_hash(case.nemo / archive.MODEL_WEIGHTS))
    write_adapter(tmp_path / "lora.nemo", file, config)
    nemo_to_peft(tmp_path / "lora.nemo", tmp_path / "adapter")
    merge_adapter(base_of(case), tmp_path / "lora.nemo", tmp_path / "merged.nemo")
    nemo_to_hf(tmp_path / "merged.nemo", tmp_path / "merged")
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        base = hf_model(case.hf)
        plain = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits
        merged = hf_model(tmp_path / "merged")(tokens).logits
    assert (adapted - plain).abs().max() > 1.0
    torch.testing.assert_close(adapted, merged, **LOGITS)


def test_a_merge_that_is_written_wrong_is_noticed(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = archive.read_model_config(case.nemo)
    write_adapter(tmp_path / "lora.nemo", random_adapter(LoraSpec(ALL, 4, 2.0), config), config)
    before, write = sorted(tmp_path.iterdir()), run.stream_weights

    def wrong(create: Any, chunks: Iterator[Chunk]) -> None:
        write(create, (Chunk(c.name, c.tensor + (c.layer == 1), c.layer, c.num_layers) for c in chunks))

    monkeypatch.setattr(run, "stream_weights", wrong)
    with pytest.raises(CheckpointError, match=r"layers\.\S+ was read back different from"):
        merge_adapter(base_of(case), tmp_path / "lora.nemo", tmp_path / "merged.nemo")
    assert sorted(tmp_path.iterdir()) == before
    merge_adapter(base_of(case), tmp_path / "lora.nemo", tmp_path / "merged.nemo", verify=False)


def test_merging_a_peft_adapter_is_pefts_merge(case: Case, tmp_path: Path) -> None:
    model = save_adapter(case, tmp_path / "made", target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True)
    peft_to_nemo(tmp_path / "made", base_of(case), tmp_path / "lora.nemo")
    merge_adapter(base_of(case), tmp_path / "lora.nemo", tmp_path / "merged.nemo")
    nemo_to_hf(tmp_path / "merged.nemo", tmp_path / "merged")
    expected, found = model.merge_and_unload().state_dict(), hf_model(tmp_path / "merged").state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # The same two products of fp32 numbers of a size of 0.1, added up in another order.
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


def test_qwen2_imports(tmp_path: Path) -> None:
    case = make_case(tmp_path, *CASES["qwen2_qkv_bias"])
    save_adapter(case, tmp_path / "made", target_modules=["q_proj", "k_proj", "down_proj"])
    peft_to_nemo(tmp_path / "made", base_of(case), tmp_path / "lora.nemo")
    nemo_to_peft(tmp_path / "lora.nemo", tmp_path / "back")
    assert_same(content(tmp_path / "back")[1], content(tmp_path / "made")[1])


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora=True is not supported: DoRA scales"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only' is not supported: an adapter has no biases"),
    "bias of B": ({"lora_bias": True}, "lora_bias=True is not supported"),
    "ranks": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.*one rank holds for all layers"),
    "alphas": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern=.*one alpha holds for all layers"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*merge the adapter with PEFT"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices=.*merge the adapter with PEFT"),
    "Conv1D": ({"fan_in_fan_out": True}, r"fan_in_fan_out=True .*\[outputs, inputs\]"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .*changes the base weights"),
    "repeated layers": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication=.*changes what the adapter"),
    "a key of the future": ({"use_wonder": True}, "use_wonder=True is not supported"),
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3'; only LORA"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, r"names \['embed_tokens'\] of this base; .*q_proj"),
    "nothing": ({"target_modules": []}, "names nothing of this base"),
    "another family's names": ({"target_modules": ["c_attn"]}, r"names \['c_attn'\] of this base"),
    "layers that differ": (
        {"target_modules": r".*(layers\.0\.self_attn\.q_proj|layers\.1\.self_attn\.v_proj)"},
        "other projections in some layers than in others",
    ),
    "no regular expression": ({"target_modules": "(q_proj"}, "no regular expression"),
    "no rank": ({"r": None}, "r=None and lora_alpha=7"),
    "another rank": ({"r": 8}, r"lora_A.weight is float32 \[4, 64\], expected floating point \[8, 64\]"),
    "fewer targets than tensors": ({"target_modules": ["q_proj"]}, "0 tensors missing .*8 unknown"),
    "more targets than tensors": ({"target_modules": ATTENTION}, "16 tensors missing .*0 unknown"),
}


@pytest.mark.parametrize(("changes", "match"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_cannot_be_expressed_is_refused(case: Case, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    save_adapter(case, tmp_path / "made", target_modules=["q_proj", "v_proj"])
    edit_config(tmp_path / "made", **changes)
    refused(case, tmp_path, match)


def refused(case: Case, folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        peft_to_nemo(folder / "made", base_of(case), folder / "lora.nemo")
    assert "\n" not in str(caught.value) and entries(folder) == {"made"}


def test_broken_folders(case: Case, tmp_path: Path) -> None:
    made = tmp_path / "made"
    save_adapter(case, made, target_modules=["q_proj", "v_proj"])
    name = "base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"
    edit_tensors(made, lambda tensors: tensors.pop(name))
    refused(case, tmp_path, rf"1 tensors missing \['{name}'\]")
    edit_tensors(made, lambda tensors: tensors.update({name: torch.zeros(64, 4)}))
    refused(case, tmp_path, r"lora_B.weight is float32 \[64, 4\], expected floating point \[32, 4\]")
    edit_tensors(
        made,
        lambda tensors: (
            [t.zero_() for n, t in tensors.items() if "v_proj" in n] and tensors.update({name: torch.zeros(32, 4)})
        ),
    )
    refused(case, tmp_path, r"A and B of \['v'\] are all zeros")
    weights = made / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(case, tmp_path, "truncated or damaged")
    weights.unlink()
    refused(case, tmp_path, "holds no weights .adapter_model.safetensors or adapter_model.bin")
    (made / "adapter_config.json").unlink()
    refused(case, tmp_path, "adapter_config.json: cannot be read")


def test_an_adapter_of_another_model(case: Case, tmp_path: Path) -> None:
    other = make_case(tmp_path / "other", "llama", {"num_hidden_layers": 5})
    save_adapter(other, tmp_path / "made", target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"0 tensors missing .*2 unknown .*layers\.4"):
        peft_to_nemo(tmp_path / "made", base_of(case), tmp_path / "lora.nemo")


def test_the_commands(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(case, tmp_path / "made", target_modules=["q_proj"])
    commands = {
        "convert_lora_hf_to_nemo": "--input_name_or_path made --base {base} --output_path lora.nemo",
        "convert_lora_nemo_to_hf": "--input_name_or_path lora.nemo --output_path back",
        "merge_lora": "--base {base} --adapter lora.nemo --output merged.nemo --precision bf16",
    }
    with contextlib.chdir(tmp_path):
        for name, line in commands.items():
            arguments = line.format(base=base_of(case)).split()
            assert tool(name).main(arguments) == 0
            assert tool(name).main(arguments) == 2  # it is there
            assert capsys.readouterr().err.strip().endswith("ask to overwrite it")
            assert tool(name).main([*arguments, "--overwrite"]) == 0
    assert_same(content(tmp_path / "back")[1], content(tmp_path / "made")[1])


def test_a_merge_with_another_base_is_refused(case: Case, tmp_path: Path) -> None:
    save_adapter(case, tmp_path / "made", target_modules=["q_proj"])
    peft_to_nemo(tmp_path / "made", base_of(case), tmp_path / "lora.nemo")
    merge_adapter(base_of(case), tmp_path / "lora.nemo", tmp_path / "merged.nemo")
    with pytest.raises(CheckpointError, match="was trained on base weights"):
        merge_adapter(tmp_path / "merged.nemo", tmp_path / "lora.nemo", tmp_path / "twice.nemo")
    with pytest.raises(CheckpointError, match="holds an adapter, not a model"):
        merge_adapter(tmp_path / "lora.nemo", tmp_path / "lora.nemo", tmp_path / "twice.nemo")
    with pytest.raises(CheckpointError, match="is no LoRA adapter"):
        merge_adapter(base_of(case), base_of(case), tmp_path / "twice.nemo")
    with pytest.raises(CheckpointError, match="exists already"):
        merge_adapter(base_of(case), tmp_path / "lora.nemo", tmp_path / "merged.nemo")
    assert entries(tmp_path) == {"made", "lora.nemo", "merged.nemo"}


@pytest.mark.parametrize("precision", [None, "bf16", "32"])
def test_the_sum_is_rounded_once_and_the_rest_keeps_its_bits(tmp_path: Path, precision: str | None) -> None:
    """A base in bf16, its adapter in bf16 too."""
    case = make_case(tmp_path, *CASES["mha"])
    hf_to_nemo(case.hf, tmp_path / "bf16.nemo", precision="bf16")
    archive.extract(tmp_path / "bf16.nemo", tmp_path / "base")
    config = archive.read_model_config(tmp_path / "base")
    file = random_adapter(LoraSpec(("linear_fc2",), 2, 4.0, "nemo", (1,)), config, torch.bfloat16)
    write_adapter(tmp_path / "lora.nemo", file, config)
    merge_adapter(tmp_path / "base", tmp_path / "lora.nemo", tmp_path / "merged.nemo", precision=precision)
    archive.extract(tmp_path / "merged.nemo", tmp_path / "merged")
    assert archive.read_model_config(tmp_path / "merged") == {**config, "precision": precision or "bf16"}
    assert entries(tmp_path / "merged") == entries(tmp_path / "base")
    dtype = torch.float32 if precision == "32" else torch.bfloat16
    expected = {name: tensor.float() for name, tensor in read_weights(tmp_path / "base" / "model_weights").items()}
    a, b = file.tensors["layers.1.linear_fc2.a.down"], file.tensors["layers.1.linear_fc2.b.down"]
    expected["model.decoder.layers.mlp.linear_fc2.weight"][1] += 2.0 * (b.float() @ a.float())
    merged = dict(read_weights(tmp_path / "merged" / "model_weights"))
    assert_same(merged, {name: tensor.to(dtype) for name, tensor in expected.items()})
