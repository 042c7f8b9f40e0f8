"""Hugging Face → .nemo → Hugging Face gives back every bit of the weights, the config key by key and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.convert import hf_to_nemo, nemo_to_hf
from nemo_dpo.tokenizer import load_tokenizer
from tests.convert.conftest import BASE, LLAMAS, TEXT, assert_same_tensors, hf_tensors, save_model


def round_trip(source: Path, **options: Any) -> tuple[Path, Path]:
    nemo, back = source.parent / "model.nemo", source.parent / "back"
    hf_to_nemo(source, nemo, **options)
    nemo_to_hf(nemo, back)
    return nemo, back


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS.keys())
def test_llama_comes_back_bit_for_bit(llama: Any, changes: dict[str, Any]) -> None:
    source = llama(**changes)
    _, back = round_trip(source)
    assert_same_tensors(source, back)
    assert read(back, "config.json") == read(source, "config.json")
    assert read(back, "generation_config.json") == read(source, "generation_config.json")


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_with_its_qkv_bias_comes_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(**{**BASE, "tie_word_embeddings": tied, "num_key_value_heads": 3}, eos_token_id=2)
    save_model(tmp_path / "hf", config)
    nemo, back = round_trip(tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", back)
    assert "model.layers.2.self_attn.k_proj.bias" in hf_tensors(back)
    assert read(back, "config.json") == read(tmp_path / "hf", "config.json")
    assert archive.read_model_config(nemo)["qkv_bias"] is True


def test_transformers_generates_the_same_from_the_export(llama: Any) -> None:
    from transformers import AutoModelForCausalLM

    source = llama()
    _, back = round_trip(source)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (source, back))
    assert torch.equal(before, after)


def test_dtype_is_kept_unless_a_precision_is_given(llama: Any, tmp_path: Path) -> None:
    source = llama(dtype=torch.bfloat16)
    nemo, back = round_trip(source)
    assert_same_tensors(source, back)
    assert archive.read_model_config(nemo)["precision"] == "bf16"
    nemo_to_hf(nemo, tmp_path / "fp32", precision="32")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(hf_tensors(tmp_path / "fp32")[name], hf_tensors(source)[name].float())
    assert read(tmp_path / "fp32", "config.json")["dtype"] == "float32"


def test_attention_bias_alone_needs_a_zero_output_bias(llama: Any) -> None:
    from transformers import AutoModelForCausalLM

    source = llama(attention_bias=True)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.o_proj\.bias is not zero"):
        hf_to_nemo(source, source.parent / "refused.nemo")
    model = AutoModelForCausalLM.from_pretrained(source)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    model.save_pretrained(source)
    _, back = round_trip(source)
    assert_same_tensors(source, back)


@pytest.mark.parametrize("options", [{"max_shard_size": "40KB"}, {}], ids=["sharded", "whole"])
def test_sharded_safetensors_and_bin_files_give_the_same_weights(llama: Any, options: dict[str, Any]) -> None:
    source = llama(options=options)
    expected = hf_tensors(source)
    if not options:
        (source / "model.safetensors").unlink()
        torch.save(expected, source / "pytorch_model.bin")
    else:
        assert len(list(source.glob("*.safetensors"))) > 3
    _, back = round_trip(source)
    exported = hf_tensors(back)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_large_exports_are_sharded_with_an_index(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from nemo_dpo.convert.hf import write_json, write_safetensors
    from nemo_dpo.convert.safetensors_file import Entry

    source = llama()
    tensors = hf_tensors(source)
    (tmp_path / "sharded").mkdir()
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "sharded", entries, tensors.items(), max_shard_bytes=40_000)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 3
    write_json(tmp_path / "sharded" / "config.json", read(source, "config.json"))
    assert_same_tensors(source, tmp_path / "sharded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_names_are_transformer_engines_and_layers_are_stacked(llama: Any, tmp_path: Path) -> None:
    """NeMo's own converter once wrote local-layer names (input_layernorm), which its models could not load."""
    nemo, _ = round_trip(llama())
    with archive.open_folder(nemo, tmp_path) as folder:
        weights = read_weights(folder / "model_weights")
        shapes = {name: tuple(weights.shape(name)) for name in weights}
    assert shapes == {
        "model.embedding.word_embeddings.weight": (384, 72),
        "model.decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 72),
        "model.decoder.layers.self_attention.linear_qkv.weight": (3, 120, 72),
        "model.decoder.layers.self_attention.linear_proj.weight": (3, 72, 72),
        "model.decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 72),
        "model.decoder.layers.mlp.linear_fc1.weight": (3, 200, 72),
        "model.decoder.layers.mlp.linear_fc2.weight": (3, 72, 100),
        "model.decoder.final_layernorm.weight": (72,),
        "model.output_layer.weight": (384, 72),
    }


def test_tokenizer_gives_the_same_ids_from_nemo_and_from_the_export(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = llama()
    nemo, back = round_trip(source)
    original, exported = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(back)
    expected = original(TEXT, add_special_tokens=False)["input_ids"]
    assert 2 in expected  # the written-out end token is recognised
    assert exported(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert exported.chat_template == original.chat_template
    with archive.open_folder(nemo, tmp_path) as folder:
        stored = load_tokenizer(archive.read_model_config(folder)["tokenizer"], folder)
    assert stored.encode(TEXT) == expected
    assert (stored.eos_id, stored.pad_id, stored.vocab_size) == (2, 2, 300)


def test_model_config_has_nemos_keys(llama: Any) -> None:
    nemo, _ = round_trip(llama(rope_parameters=LLAMAS["llama3_rope"]["rope_parameters"]))
    config = archive.read_model_config(nemo)
    expected = {
        "mcore_gpt": True, "num_layers": 3, "hidden_size": 72, "ffn_hidden_size": 100, "num_attention_heads": 9,
        "num_query_groups": 3, "kv_channels": 8, "vocab_size": 301, "make_vocab_size_divisible_by": 128,
        "encoder_seq_length": 128, "max_position_embeddings": 128, "layernorm_epsilon": 1e-5, "bias": False,
        "qkv_bias": False, "normalization": "rmsnorm", "activation": "fast-swiglu", "position_embedding_type": "rope",
        "rotary_base": 500000.0, "rotary_percentage": 1.0, "scale_positional_embedding": True,
        "seq_len_interpolation_factor": None, "share_embeddings_and_output_weights": False, "precision": "32",
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert config["rope_scaling"]["factor"] == 32.0
    assert config["tokenizer"]["library"] == "huggingface" and config["tokenizer"]["type"].startswith("nemo:")


def test_hparams_file_adds_keys_but_does_not_change_shapes(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text(
        "model: {hidden_size: 1, micro_batch_size: 4, apply_query_key_layer_scaling: true}"
    )
    nemo, _ = round_trip(llama(), hparams_file=tmp_path / "hparams.yaml")
    config = archive.read_model_config(nemo)
    assert (config["hidden_size"], config["micro_batch_size"], config["apply_query_key_layer_scaling"]) == (72, 4, True)


def test_an_hparams_file_that_makes_another_model_is_refused_at_once(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("openai_gelu: true")
    with pytest.raises(CheckpointError, match=r"hparams.yaml: its keys make activation 'gelu_tanh'.* says 'silu'"):
        hf_to_nemo(llama(), tmp_path / "a.nemo", precision=None, hparams_file=tmp_path / "hparams.yaml")
    assert not (tmp_path / "a.nemo").exists()


def edit_model_config(nemo: Path, scratch: Path, **changes: Any) -> Path:
    """An extracted copy of `nemo` with other keys; a value of ... removes the key."""
    folder = scratch / "extracted"
    archive.extract(nemo, folder)
    config = {**archive.read_model_config(folder), **changes}
    archive.write_model_config({key: value for key, value in config.items() if value is not ...}, folder)
    return folder


def test_nemos_keys_win_over_the_stored_config(llama: Any, tmp_path: Path) -> None:
    nemo, back = round_trip(llama())
    folder = edit_model_config(nemo, tmp_path, rotary_base=250000.0, layernorm_epsilon=1e-6)
    nemo_to_hf(folder, tmp_path / "edited")
    config, expected = read(tmp_path / "edited", "config.json"), read(back, "config.json")
    del expected["rope_parameters"]
    expected |= {"rope_theta": 250000.0, "rope_scaling": None, "rms_norm_eps": 1e-6}
    assert config == expected


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_configs_of_transformers_4_come_back_in_their_own_form(llama: Any, scaling: dict[str, Any] | None) -> None:
    source = llama()
    config = read(source, "config.json")
    for name in ("rope_parameters", "dtype", "head_dim", "attention_bias", "mlp_bias"):
        del config[name]
    config |= {"rope_theta": 100000.0, "rope_scaling": scaling, "torch_dtype": "float32", "num_key_value_heads": 3}
    (source / "config.json").write_text(json.dumps(config))
    nemo, back = round_trip(source)
    assert read(back, "config.json") == config
    assert archive.read_model_config(nemo)["seq_len_interpolation_factor"] == (2.0 if scaling else None)


def test_a_config_without_a_dtype_gets_none(llama: Any, tmp_path: Path) -> None:
    source = llama(dtype=torch.bfloat16)
    config = read(source, "config.json")
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    nemo, back = round_trip(source)
    assert read(back, "config.json") == config
    nemo_to_hf(nemo, tmp_path / "fp32", precision="32")
    assert read(tmp_path / "fp32", "config.json") == {**config, "torch_dtype": "float32"}


def test_a_nemo_without_the_stored_config_is_exported_all_the_same(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = llama()
    nemo, _ = round_trip(source)
    folder = edit_model_config(nemo, tmp_path, huggingface=..., vocab_size=..., num_query_groups=3, kv_channels=None)
    nemo_to_hf(folder, tmp_path / "foreign")
    exported = hf_tensors(tmp_path / "foreign")
    assert read(tmp_path / "foreign", "config.json")["torch_dtype"] == "float32"
    assert exported["model.embed_tokens.weight"].shape == (300, 72)  # NeMo takes the size from the tokenizer
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits[..., :300]
            for f in (source, tmp_path / "foreign")
        )
    assert torch.equal(before, after)
