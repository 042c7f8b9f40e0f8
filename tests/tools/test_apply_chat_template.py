"""Prompts in a model's chat template: what changes, what stays, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.convert import hf_to_nemo
from tests.support.tiny import byte_tokenizer, write_hf_model
from tools.data import apply_chat_template as tool

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[bot] {% endif %}"
)
ROW = {"prompt": "Wer? 東京", "chosen_response": "Ich.", "rejected_response": "Du."}


def tokenizer_folder(folder: Path, template: str | None = TEMPLATE) -> Path:
    """The byte tokenizer with a chat template, without a model."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_only_the_prompt_changes_and_the_answer_comes_next(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "hf")
    source = write(tmp_path / "in.jsonl", {**ROW, "chosen_reward": 2, "id": "a"}, ROW)
    assert tool.apply_chat_template(folder, source, tmp_path / "out.jsonl") == 2
    prompt = "[user] Wer? 東京\n[bot] "
    assert read(tmp_path / "out.jsonl") == [
        {**ROW, "prompt": prompt, "chosen_reward": 2, "id": "a"},
        {**ROW, "prompt": prompt},
    ]


def test_a_nemo_archive_and_its_hugging_face_folder_give_the_same(tmp_path: Path) -> None:
    hf = tokenizer_folder(write_hf_model(tmp_path / "hf", num_hidden_layers=1))
    hf_to_nemo(hf, tmp_path / "model.nemo")
    source = write(tmp_path / "in.jsonl", ROW)
    outputs = []
    for model in (hf, tmp_path / "model.nemo"):
        arguments = ["--model", str(model), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
        assert tool.main(arguments) == 0
        outputs.append((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert outputs[0] == outputs[1]
    assert "[bot]" in outputs[0]
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "model.nemo", "in.jsonl", "out.jsonl"}


@pytest.mark.parametrize(
    ("template", "rows", "told"),
    [
        (None, [ROW], "no chat template"),
        (
            TEMPLATE,
            [ROW, {"prompt": "x", "chosen_response": "y"}],
            "in.jsonl:2: the field rejected_response is missing",
        ),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    template: str | None, rows: list[dict[str, Any]], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tokenizer_folder(tmp_path / "hf", template)
    source, target = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    assert tool.main(["--model", str(folder), "--input", str(source), "--output", str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    assert not target.exists()


def test_a_missing_file_and_a_missing_model_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, source = tokenizer_folder(tmp_path / "hf"), write(tmp_path / "in.jsonl", ROW)
    for model, file in ((folder, tmp_path / "none.jsonl"), (tmp_path / "none", source)):
        assert tool.main(["--model", str(model), "--input", str(file), "--output", str(tmp_path / "out.jsonl")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "none" in error
