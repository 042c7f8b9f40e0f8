"""The command-line converters: NeMo's argument names, exit status, one-line errors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.convert.conftest import assert_same_tensors

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "convert"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_and_back(llama: Any, tmp_path: Path) -> None:
    source, nemo, back = llama(), tmp_path / "out" / "mcore_gpt.nemo", tmp_path / "back"
    to_nemo, to_hf = tool("convert_llama_hf_to_nemo"), tool("convert_llama_nemo_to_hf")
    assert to_nemo.main(["--input_name_or_path", str(source), "--output_path", str(nemo)]) == 0
    assert to_hf.main(["--input_name_or_path", str(nemo), "--output_path", str(back)]) == 0
    assert_same_tensors(source, back)


def test_errors_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input_name_or_path", str(tmp_path / "none"), "--output_path", str(tmp_path / "x")]
    for name in ("convert_llama_hf_to_nemo", "convert_llama_nemo_to_hf", "convert_gguf_to_hf"):
        assert tool(name).main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "none" in error


def test_a_hub_id_without_a_network_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ["--input_name_or_path", "no-such-organisation/no-such-model", "--output_path", "x.nemo"]
    assert tool("convert_llama_hf_to_nemo").main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no model of that name can be downloaded" in error


def test_a_script_runs_from_anywhere_and_asks_for_help_without_torch(tmp_path: Path) -> None:
    script = str(TOOLS / "convert_llama_hf_to_nemo.py")
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({script!r}, run_name='__main__')\n"
    code += "except SystemExit as e: sys.exit(e.code or 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--hparams_file" in done.stdout
