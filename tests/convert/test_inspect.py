"""inspect.py: what it says of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint import archive
from nemo_dpo.checkpoint.fingerprint import weights_hash
from nemo_dpo.convert import cli, hf_to_nemo
from nemo_dpo.convert.summary import summarise
from tests.convert.conftest import hf_tensors

main = cli.inspect_script("Show what a checkpoint is.")
SIZES = {
    "family": "llama", "layers": 3, "hidden size": 72, "MLP size": 100, "attention heads": 9, "query groups": 3,
    "head size": 8, "vocabulary": 301, "positions": 128, "tied embeddings": False, "rotary base": 100000.0,
}  # fmt: skip


def test_a_hugging_face_folder_and_its_nemo(llama: Any, tmp_path: Path) -> None:
    source = llama()
    hf_to_nemo(source, tmp_path / "model.nemo")
    hf, nemo = summarise(source), summarise(tmp_path / "model.nemo")
    count = sum(tensor.numel() for tensor in hf_tensors(source).values())
    for facts in (hf, nemo):
        assert {name: facts[name] for name in SIZES} == SIZES
        assert (facts["parameters"], facts["bytes"]) == (count, 4 * count)  # without the rows that pad the vocabulary
        assert facts["parameters by dtype"] == {"float32": count}
        assert (facts["tokenizer"]["tokens"], facts["tokenizer"]["end"]) == (300, 2)
    assert (hf["format"], nemo["format"]) == ("Hugging Face folder", ".nemo")
    assert hf["files"] == 1 and nemo["rows of the vocabulary"] == 384
    assert nemo["trained parallel"] == {"tensor": 1, "pipeline": 1, "virtual pipeline": None, "sequence": False}
    archive.extract(tmp_path / "model.nemo", tmp_path / "folder")
    assert hf["hash"] == nemo["hash"] == weights_hash(tmp_path / "folder" / archive.MODEL_WEIGHTS)


def test_the_hash_is_that_of_the_values(llama: Any) -> None:
    from safetensors.torch import save_file

    source = llama()
    before = summarise(source)["hash"]
    tensors = hf_tensors(source)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] += 1e-3
    save_file(tensors, source / "model.safetensors")
    assert summarise(source)["hash"] != before


def test_dtypes_are_counted_apart(llama: Any) -> None:
    from safetensors.torch import save_file

    source = llama()
    tensors = {name: t if "norm" in name else t.to(torch.bfloat16) for name, t in hf_tensors(source).items()}
    save_file(tensors, source / "model.safetensors")
    facts = summarise(source, hashed=False)
    assert facts["parameters by dtype"] == {"bfloat16": facts["parameters"] - 7 * 72, "float32": 7 * 72}
    assert facts["bytes"] == 2 * facts["parameters"] + 2 * 7 * 72 and "hash" not in facts


def test_table_and_json(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert main([str(source)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index(line.split("  ")[-1].strip()) for line in lines}) == 1  # two columns
    cells = dict(line.split("  ", 1) for line in lines)
    assert {name: value.strip() for name, value in cells.items()}["tied embeddings"] == "no"
    assert any(
        line.startswith("parameters ") and line.endswith(f"{summarise(source)['parameters']:,}") for line in lines
    )
    assert main([str(source), "--json", "--skip_hash"]) == 0
    assert json.loads(capsys.readouterr().out) == summarise(source, hashed=False)


def test_a_checkpoint_without_a_tokenizer_says_so(llama: Any) -> None:
    source = llama()
    (source / "tokenizer.json").unlink()
    assert summarise(source, hashed=False)["tokenizer"].startswith("none (")


def test_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in ("none", "empty"):
        assert main([str(tmp_path / wrong)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and wrong in error
