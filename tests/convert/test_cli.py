"""The command-line converters: NeMo's argument names, families, inputs, exit status, one-line errors."""

from __future__ import annotations

import fnmatch
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert import gguf, hf_to_nemo, nemo_to_hf
from nemo_dpo.convert.summary import summarise
from tests.convert.conftest import BASE, assert_same_tensors, hf_tensors, save_model
from tests.convert.test_gguf import write_gguf

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "convert"
FAMILIES = ("llama", "mistral_7b", "mixtral", "qwen2", "gemma")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(source: Path | str, target: Path | str) -> list[str]:
    return ["--input_name_or_path", str(source), "--output_path", str(target)]


@pytest.mark.parametrize("family", ["llama_", ""])
def test_there_and_back(llama: Any, tmp_path: Path, family: str) -> None:
    source, nemo, back = llama(), tmp_path / "out" / "mcore_gpt.nemo", tmp_path / "back"
    assert tool(f"convert_{family}hf_to_nemo").main(arguments(source, nemo)) == 0
    assert tool(f"convert_{family}nemo_to_hf").main(arguments(nemo, back)) == 0
    assert_same_tensors(source, back)


def test_mixtral_there_and_back(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    source, nemo, back = tmp_path / "hf", tmp_path / "mcore_gpt.nemo", tmp_path / "back"
    save_model(source, MixtralConfig(**BASE, num_local_experts=3))
    assert tool("convert_mixtral_hf_to_nemo").main(arguments(source, nemo)) == 0
    assert tool("convert_mixtral_nemo_to_hf").main(arguments(nemo, back)) == 0
    assert all(summarise(path)["experts"] == {"each layer": 3, "each token": 2} for path in (source, nemo, back))
    assert_same_tensors(source, back)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_how_far_it_is(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    source, screen = llama(), io.StringIO()
    screen.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    hf_to_nemo(source, tmp_path / "x.nemo")
    nemo_to_hf(tmp_path / "x.nemo", tmp_path / "back")
    for title in ("to .nemo", "to Hugging Face", "compare"):
        assert (f"{title}:   0%|" in screen.getvalue()) == terminal


def test_nemos_names_of_precisions(llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, main = llama(), tool("convert_llama_hf_to_nemo").main
    assert main([*arguments(source, tmp_path / "x.nemo"), "--precision", "bf16-mixed"]) == 0
    assert archive.read_model_config(tmp_path / "x.nemo")["precision"] == "bf16"
    assert main([*arguments(source, tmp_path / "y.nemo"), "--precision", "8"]) == 2
    assert "precision='8'" in capsys.readouterr().err


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_a_script_refuses_another_family_by_name(
    llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    source = llama()
    hf_to_nemo(source, tmp_path / "llama.nemo")
    meant = family.removesuffix("_7b")
    capsys.readouterr()  # transformers' own progress bars
    for way, given in (("hf_to_nemo", source), ("nemo_to_hf", tmp_path / "llama.nemo")):
        assert tool(f"convert_{family}_{way}").main(arguments(given, tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "'llama'" in error and f"this is for {meant}" in error
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "llama.nemo"}


def test_a_nemo_that_does_not_say_where_it_came_from_is_what_the_script_is_for(llama: Any, tmp_path: Path) -> None:
    """A model_config.yaml of NeMo's own converter fits Llama and Mistral alike."""
    hf_to_nemo(llama(), tmp_path / "own.nemo")
    archive.extract(tmp_path / "own.nemo", tmp_path / "foreign")
    config = archive.read_model_config(tmp_path / "foreign")
    archive.write_model_config({key: config[key] for key in config if key != "huggingface"}, tmp_path / "foreign")
    for family, model_type in (("mistral_7b", "mistral"), ("llama", "llama")):
        main = tool(f"convert_{family}_nemo_to_hf").main
        assert main(arguments(tmp_path / "foreign", tmp_path / family)) == 0
        assert json.loads((tmp_path / family / "config.json").read_text())["model_type"] == model_type


def test_a_family_that_is_not_supported_is_named(
    llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = llama()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert tool("convert_hf_to_nemo").main(arguments(source, tmp_path / "x.nemo")) == 2
    assert "model_type='mamba' is not supported" in capsys.readouterr().err


def test_errors_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("convert_llama_hf_to_nemo", "convert_llama_nemo_to_hf", "convert_gguf_to_hf", "convert_hf_to_nemo"):
        assert tool(name).main(arguments(tmp_path / "none", tmp_path / "x")) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "none" in error


@pytest.mark.parametrize("form", ["whole", "shards", "torch before 1.6"])
def test_bin_files(llama: Any, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    source = llama()
    tensors = hf_tensors(source)
    (source / "model.safetensors").unlink()
    if form == "shards":
        names = sorted(tensors)
        weight_map = {name: f"pytorch_model-{n % 2}.bin" for n, name in enumerate(names)}  # every layer in both files
        for file in set(weight_map.values()):
            torch.save({name: tensors[name] for name in names if weight_map[name] == file}, source / file)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=form == "whole")
    assert tool("convert_hf_to_nemo").main(arguments(source, tmp_path / "x.nemo")) == 0
    assert ("into memory" in caplog.text) == (form == "torch before 1.6")
    assert tool("convert_nemo_to_hf").main(arguments(tmp_path / "x.nemo", tmp_path / "back")) == 0
    exported = hf_tensors(tmp_path / "back")
    assert exported.keys() == tensors.keys() and all(torch.equal(exported[name], tensors[name]) for name in tensors)


def test_a_gguf_file(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_PERPLEXITY", float("inf"))  # of a random model
    source = llama()
    write_gguf(tmp_path / "tiny.gguf", source, 9, 3)
    assert tool("convert_llama_hf_to_nemo").main(arguments(tmp_path / "tiny.gguf", tmp_path / "x.nemo")) == 0
    assert tool("convert_llama_nemo_to_hf").main(arguments(tmp_path / "x.nemo", tmp_path / "back")) == 0
    assert_same_tensors(source, tmp_path / "back")
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "tiny.gguf", "x.nemo", "back"}  # no folder between


def test_a_hub_id_from_the_cache(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, without a network, on a cache of the form that a download leaves."""
    model = tmp_path / "cache" / "models--organisation--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123abc")
    shutil.copytree(llama(), model / "snapshots" / "0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert tool("convert_llama_hf_to_nemo").main(arguments("organisation/tiny", "x.nemo")) == 0
    assert archive.read_model_config(tmp_path / "x.nemo")["num_layers"] == 3


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_bin_files_are_downloaded_only_where_there_are_no_safetensors(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_safetensors: bool
) -> None:
    hub, cache = llama("hub"), tmp_path / "cache"
    torch.save(hf_tensors(hub), hub / "pytorch_model.bin")
    (hub / "onnx").mkdir()
    (hub / "onnx" / "model.safetensors").write_bytes(b"another format")
    if not has_safetensors:
        (hub / "model.safetensors").unlink()

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        """As huggingface_hub documents it: patterns of fnmatch against paths."""
        assert name == "organisation/tiny"
        for file in (path for path in hub.rglob("*") if path.is_file()):
            path = file.relative_to(hub).as_posix()
            allowed = any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(path, pattern) for pattern in ignore_patterns):
                (cache / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / path)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert tool("convert_llama_hf_to_nemo").main(arguments("organisation/tiny", "x.nemo")) == 0
    weights = {file.name for file in cache.iterdir() if file.suffix in (".safetensors", ".bin")}
    assert weights == ({"model.safetensors"} if has_safetensors else {"pytorch_model.bin"})
    assert not (cache / "onnx").exists()


def test_a_hub_id_without_a_network_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("convert_llama_hf_to_nemo", "convert_hf_to_nemo"):
        assert tool(name).main(arguments("no-such-organisation/no-such-model", "x.nemo")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "no model of that name can be downloaded" in error
        assert "give its folder" in error


def test_an_existing_output_is_refused_before_a_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    (tmp_path / "x.nemo").write_text("precious")
    assert tool("convert_hf_to_nemo").main(arguments("organisation/tiny", tmp_path / "x.nemo")) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(path.name for path in TOOLS.glob("*.py")))
def test_every_script_runs_from_anywhere(tmp_path: Path, script: str) -> None:
    """Python puts a script's folder first on its path, and in this one there is an inspect.py, as in the library."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(TOOLS / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script}")


@pytest.mark.parametrize("script", ["convert_llama_hf_to_nemo", "verify"])
def test_help_comes_without_torch(script: str) -> None:
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(TOOLS / script)!r} + '.py', "
    code += "run_name='__main__')\nexcept SystemExit as e: sys.exit(e.code or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
