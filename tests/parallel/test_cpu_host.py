"""megatron-core on a CPU host: named functions are rewritten once, and nothing watches operations afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.convert import hf_to_nemo
from nemo_dpo.parallel import cpu_host
from tests.parallel.host_cases import hooks, install_twice, install_with_an_unknown_function
from tests.support.cli import run_cli
from tests.support.ranks import run_ranks
from tests.support.tiny import write_hf_model, write_pairs


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(run_ranks(1, install_twice, tmp_path_factory.mktemp("installed"))[0])


def test_every_listed_function_exists_and_names_a_device(installed: dict[str, Any]) -> None:
    """A function without such a literal need not be listed."""
    assert len(installed["before"]) == sum(map(len, cpu_host.DEVICE_LITERALS.values()))
    for name, found in installed["before"].items():
        assert any("cuda" in text for text in found), name


def test_no_literal_names_cuda_afterwards(installed: dict[str, Any]) -> None:
    for name, found in installed["after"].items():
        before = installed["before"][name]
        assert found == [text.replace("torch.cuda.", "torch.").replace("cuda", "cpu") for text in before], name


def test_a_second_call_changes_nothing(installed: dict[str, Any]) -> None:
    assert all(installed["same_code"]) and all(installed["same_answers"])


def test_the_host_answers(installed: dict[str, Any]) -> None:
    assert (installed["device"], installed["tensor_stays"]) == ("cpu", "cpu")


def test_an_unknown_megatron_core_is_refused(tmp_path: Path) -> None:
    (error,) = run_ranks(1, install_with_an_unknown_function, tmp_path)
    assert "megatron.core.utils has no no_such_function" in error


def test_a_host_with_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="on a host with CUDA"):
        cpu_host.install()


def test_hooks_are_seen_where_there_are_some() -> None:
    """The check of the next test can fail."""

    class Mode(torch.overrides.TorchFunctionMode):
        pass

    quiet = hooks()
    with Mode():
        assert hooks()["function modes"] == quiet["function modes"] + 1
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert hooks()["saved tensor hooks"] == 1
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert hooks()["dispatch modes"] == quiet["dispatch modes"] + 1


def test_nothing_is_live_during_a_step(tmp_path: Path, installed: dict[str, Any]) -> None:
    hf_to_nemo(write_hf_model(tmp_path / "hf"), tmp_path / "tiny.nemo", precision="32")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    arguments = [
        f"pretrained_checkpoint.restore_from_path={tmp_path / 'tiny.nemo'}",
        f"model.data.data_prefix={{train: [{pairs}], validation: [{pairs}]}}",
        "model.global_batch_size=4",
        "trainer.precision=32",
        "trainer.accelerator=cpu",
        "exp_manager.create_checkpoint_callback=false",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false",
        "exp_manager.plot_on_train_end=false",
    ]
    run = run_cli(arguments, tmp_path / "run", patches=["tests.parallel.host_cases:record_hooks"])
    live = [json.loads(line.partition("live: ")[2]) for line in run.output.splitlines() if "live: " in line]
    assert len(live) == 3 * 4  # validation, one step, validation, of four micro-batches each
    assert live == [dict.fromkeys(installed["hooks"], 0)] * len(live)
