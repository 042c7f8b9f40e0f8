"""What cannot be converted faithfully is refused by name, before anything is written."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError, SaveError, archive
from nemo_dpo.checkpoint.weights import Chunk, write_weights
from nemo_dpo.convert import hf_to_nemo, nemo_to_hf
from nemo_dpo.convert.hf import read_json
from nemo_dpo.model.architecture import ArchitectureError
from nemo_dpo.tokenizer import TokenizerError
from tests.convert.conftest import hf_tensors
from tests.support.disk import full_disk


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")


def refused(source: Path, match: str, error: type[ValueError] = CheckpointError) -> None:
    target = source.parent / "refused.nemo"
    with pytest.raises(error, match=match) as caught:
        hf_to_nemo(source, target)
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in source.parent.iterdir()} == {source.name}  # neither output nor temporary files


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias without attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "RoPE scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"num_key_value_heads": 2}, "no multiple of num_key_value_heads=2"),
        ({"hidden_size": 90}, r"has shape \[301, 72\], config.json implies \[301, 90\]"),
        ({"num_hidden_layers": 2}, "0 missing .* 9 unknown"),
        ({"num_hidden_layers": 4}, "9 missing .* 0 unknown"),
    ],
)
def test_configs_that_do_not_fit(llama: Any, changes: dict[str, Any], match: str) -> None:
    source = llama()
    edit_config(source, **changes)
    refused(source, match)


@pytest.mark.parametrize("changes", [{"use_sliding_window": True}, {"layer_types": ["sliding_attention"]}])
def test_qwen2_with_sliding_windows(llama: Any, changes: dict[str, Any]) -> None:
    source = llama()
    edit_config(source, model_type="qwen2", **changes)
    refused(source, "sliding")


def test_a_parameter_that_the_table_does_not_know(llama: Any) -> None:
    source = llama()
    rewrite_weights(source, {**hf_tensors(source), "model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    refused(source, r"1 unknown \['model.layers.0.self_attn.q_norm.weight'\]")


def test_rope_frequencies_in_old_files_are_no_parameters(llama: Any) -> None:
    source = llama()
    rewrite_weights(source, {**hf_tensors(source), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    hf_to_nemo(source, source.parent / "model.nemo")


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_in_the_file_must_repeat_the_embedding(llama: Any, equal: bool) -> None:
    source = llama(tie_word_embeddings=True)
    tensors = hf_tensors(source)
    head = tensors["model.embed_tokens.weight"].clone()
    if not equal:
        head[3, 5] += 1e-3
    rewrite_weights(source, {**tensors, "lm_head.weight": head})
    if equal:
        hf_to_nemo(source, source.parent / "model.nemo")
    else:
        refused(source, "lm_head.weight differs from model.embed_tokens.weight")


def test_layers_of_different_dtypes_need_a_precision(llama: Any) -> None:
    source = llama()
    tensors = hf_tensors(source)
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].bfloat16()
    rewrite_weights(source, tensors)
    refused(source, r"layer 1 is torch.bfloat16 .*\(set the precision")
    hf_to_nemo(source, source.parent / "model.nemo", precision="bf16")


def test_parts_of_different_dtypes_are_not_fused_silently(llama: Any) -> None:
    source = llama()
    tensors = hf_tensors(source)
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite_weights(source, {**tensors, name: tensors[name].bfloat16()})
    refused(source, "linear_qkv.weight is made of torch.bfloat16, torch.float32")


def test_missing_and_damaged_inputs(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        hf_to_nemo(tmp_path / "nowhere", tmp_path / "x.nemo")
    source = llama()
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(source, "truncated or damaged")
    file.unlink()
    refused(source, "holds no weights")
    (source / "config.json").write_text("{")
    refused(source, "not valid JSON")


def test_an_index_that_names_a_file_outside(llama: Any) -> None:
    source = llama()
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, "'../elsewhere.safetensors', which is not in the folder")


def test_no_tokenizer(llama: Any) -> None:
    source = llama()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / file).unlink()
    refused(source, "holds no tokenizer", TokenizerError)


@pytest.fixture
def converted(llama: Any) -> tuple[Path, Path]:
    source = llama()
    hf_to_nemo(source, source.parent / "model.nemo")
    return source, source.parent / "model.nemo"


def test_a_full_disk_leaves_what_was_there_and_no_rubbish(converted: tuple[Path, Path]) -> None:
    source, nemo = converted
    before = nemo.read_bytes()
    for convert in (
        lambda: hf_to_nemo(source, nemo, overwrite=True),
        lambda: nemo_to_hf(nemo, source.parent / "back"),
    ):
        with full_disk(100_000), pytest.raises(CheckpointError) as caught:
            convert()
        assert "\n" not in str(caught.value)
    assert nemo.read_bytes() == before
    assert {entry.name for entry in nemo.parent.iterdir()} == {"hf", "model.nemo"}


def test_an_error_of_the_system_says_which_file_and_what_was_done_with_it(
    converted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = converted
    output = tmp_path / "x.nemo"
    cases = [
        (OSError(errno.EIO, "Input/output error", str(source / "model.safetensors")), CheckpointError,
         r"hf/model\.safetensors: cannot be read \(Input/output error\)"),
        (OSError(errno.EACCES, "Permission denied", str(tmp_path)), SaveError,
         r"x\.nemo: cannot be written \(Permission denied\)"),
        (OSError(errno.EACCES, "Permission denied", str(tmp_path / ".x.nemo.ab" / "content")), SaveError,
         r"x\.nemo: cannot be written \(Permission denied\)"),
        (OSError(errno.EDQUOT, "Quota exceeded"), SaveError, r"x\.nemo: cannot be written \(Quota exceeded\)"),
        (OSError(errno.ENOSPC, "No space left on device"), SaveError,
         r"x\.nemo: cannot be written \(No space left on device; free some space\)"),
    ]  # fmt: skip
    for error, kind, match in cases:

        def fail(*_: Any, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr("nemo_dpo.convert.run.stream_weights", fail)
        with pytest.raises(kind, match=f"{match}$") as caught:
            hf_to_nemo(source, output)
        assert type(caught.value) is kind and not output.exists()


def test_a_full_disk_is_named_though_torch_hides_it(tmp_path: Path) -> None:
    chunk = Chunk("x", torch.zeros(100_000))
    with full_disk(10_000), pytest.raises(SaveError, match=r"distcp: cannot be written \(File too large\)$"):
        write_weights(tmp_path / "w", [chunk])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 2}, r"has shape \[3, 72\], model_config.yaml implies \[2, 72\]"),
        ({"ffn_hidden_size": None}, "has shape"),  # null is four times the hidden size
        ({"share_embeddings_and_output_weights": True}, r"1 unknown \['model.output_layer.weight'\]"),
        ({"qkv_bias": True}, "1 missing"),
        ({"rotary_percentage": 0.5}, "rotary_percentage"),
        ({"vocab_size": 385}, r"has shape \[384, 72\]"),
        ({"huggingface": None, "activation": "gelu"}, "activation='gelu'"),
        ({"rotary_interleaved": True}, "rotary_interleaved=True"),
        ({"layernorm_zero_centered_gamma": True}, "zero_centered_norm=True"),
        ({"openai_gelu": True}, "activation='gelu_tanh'"),
        ({"headscale": True}, "headscale=True"),
        ({"tokenizer": {}}, "tokenizer"),
    ],
)
def test_a_nemo_that_contradicts_itself(converted: Any, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    folder = tmp_path / "extracted"
    archive.extract(converted[1], folder)
    archive.write_model_config({**archive.read_model_config(folder), **changes}, folder)
    with pytest.raises(ValueError, match=match) as caught:
        nemo_to_hf(folder, tmp_path / "back")
    assert isinstance(caught.value, ArchitectureError | CheckpointError | TokenizerError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_an_existing_output_is_replaced_only_on_request(llama: Any, tmp_path: Path) -> None:
    source, nemo, back = llama(), tmp_path / "model.nemo", tmp_path / "back"
    nemo.write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        hf_to_nemo(source, nemo)
    assert nemo.read_text() == "precious"
    hf_to_nemo(source, nemo, overwrite=True)
    back.mkdir()
    (back / "notes.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        nemo_to_hf(nemo, back)
    assert (back / "notes.txt").read_text() == "precious"
    (back / "config.json").write_text("{}")  # as of an earlier export
    nemo_to_hf(nemo, back, overwrite=True)
    assert read_json(back / "config.json")["model_type"] == "llama" and not (back / "notes.txt").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "model.nemo", "back"}


@pytest.mark.parametrize("what", ["config.json is missing", "another file", "a folder", "no folder"])
def test_what_is_no_earlier_export_is_never_replaced(converted: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    """Such as the folder that holds the checkpoint itself."""
    _, nemo = converted
    output, precious = tmp_path / "out", tmp_path / "out" / "precious.nemo"
    if what == "no folder":
        output.write_text("precious")
    else:
        output.mkdir()
        (output / ("tokenizer.json" if what == "config.json is missing" else "config.json")).write_text("{}")
        if what == "a folder":
            (output / "work").mkdir()
        elif what == "another file":
            precious.write_text("precious")
    before = sorted(output.rglob("*"))
    with pytest.raises(CheckpointError, match="no folder of an earlier export"):
        nemo_to_hf(nemo, output, overwrite=True)
    assert output.exists() and sorted(output.rglob("*")) == before


def test_a_rename_that_fails_puts_the_earlier_folder_back(
    converted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, nemo = converted
    output, rename = tmp_path / "out", Path.rename
    nemo_to_hf(nemo, output)
    before = (output / "model.safetensors").stat().st_ino

    def fail(path: Path, target: Path) -> Path:
        if path.name == "content":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        nemo_to_hf(nemo, output, overwrite=True)
    assert (output / "model.safetensors").stat().st_ino == before
