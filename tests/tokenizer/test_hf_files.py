"""Files of a Hugging Face tokenizer: all of them travel, none arrives cut off, and what differs is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert import cli, hf_to_nemo, nemo_to_hf
from nemo_dpo.tokenizer import (
    NoTokenizerError,
    TokenizerError,
    copy_hf_files,
    differences,
    export_tokenizer,
    load_tokenizer,
)
from tests.convert.conftest import BASE, CHAT_TEMPLATE, save_model, save_tokenizer
from tests.tokenizer.test_tokenizer_forms import gpt2_files, sentencepiece_file

verify = cli.verify_script("Compare two checkpoints.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer.json."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model") / "hf"
    save_model(folder, LlamaConfig(**BASE, eos_token_id=2))
    return folder


def without_tokenizer(model: Path, into: Path) -> Path:
    shutil.copytree(model, into, ignore=shutil.ignore_patterns("tokenizer*", "special*", "*.jinja"))
    return into


def one_json(model: Path, into: Path) -> None:
    shutil.copytree(model, into)


def two_files(model: Path, into: Path) -> None:
    """GPT-2's, as transformers reads them where there is no tokenizer.json."""
    gpt2_files(without_tokenizer(model, into))
    (into / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})
    )


def one_model(model: Path, into: Path) -> None:
    sentencepiece_file(without_tokenizer(model, into), "bpe").rename(into / "tokenizer.model")
    (into / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}))
    for rest in ("corpus.txt", "bpe.vocab"):
        (into / rest).unlink()


def both(model: Path, into: Path) -> None:
    """transformers reads the tokenizer.json and leaves the model to others, whole or not."""
    one_model(model, into)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / file, into)


FORMS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "tokenizer.json": (one_json, "tokenizer.json"),
    "its configuration": (one_json, "tokenizer_config.json"),
    "vocab.json": (two_files, "vocab.json"),
    "merges.txt": (two_files, "merges.txt"),
    "SentencePiece": (one_model, "tokenizer.model"),
    "SentencePiece beside a tokenizer.json": (both, "tokenizer.model"),
}


@pytest.mark.parametrize(("make", "name"), FORMS.values(), ids=FORMS.keys())
def test_a_file_that_is_cut_off_is_not_passed_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path, Path], None], name: str
) -> None:
    source, nemo = tmp_path / "hf", tmp_path / "model.nemo"
    make(model, source)
    hf_to_nemo(source, nemo)
    shutil.copytree(source, tmp_path / "cut")
    whole = (source / name).read_bytes()
    (tmp_path / "cut" / name).write_bytes(whole[: len(whole) * 2 // 3].rstrip())
    with pytest.raises(TokenizerError) as caught:
        hf_to_nemo(tmp_path / "cut", tmp_path / "refused.nemo")
    assert "cut" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "cut", "model.nemo"}
    capsys.readouterr()
    for words in ([nemo, tmp_path / "cut"], [tmp_path / "cut", tmp_path / "cut"]):
        assert verify([*map(str, words), "--skip_logits"]) == 1
        said = capsys.readouterr().out
        assert "tokenizer: that of the" in said and "cut" in said and "equal to the bit" in said


def test_an_archive_with_a_tokenizer_that_is_cut_off_is_not_exported(model: Path, tmp_path: Path) -> None:
    hf_to_nemo(model, tmp_path / "model.nemo")
    archive.extract(tmp_path / "model.nemo", tmp_path / "nemo")
    (file,) = (tmp_path / "nemo").glob("*/tokenizer.json")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: truncated or damaged"):
        nemo_to_hf(tmp_path / "nemo", tmp_path / "back")
    assert not (tmp_path / "back").exists()


HOSTILE = {
    "nested without end": (b"[" * 100_000, "nested without end"),
    "nested in an object": (b'{"a":' * 900 + b"1" + b"}" * 900, "nested deeper|nested without end"),
    "a list": (b"[]", "holds a list"),
    "half a surrogate pair": (rb'{"a": "\ud800"}', "surrogates"),
    "no UTF-8": (b"\xff\xfe{}", "can't decode"),
    "an object of nothing": (b"{}", "no tokenizer that transformers can read"),
    "a model of no kind": (b'{"model": {"type": "x"}}', "no tokenizer that transformers can read"),
}


@pytest.mark.parametrize(("content", "match"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_tokenizer_json_of_anything(model: Path, tmp_path: Path, content: bytes, match: str) -> None:
    shutil.copytree(model, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=match) as caught:
        hf_to_nemo(tmp_path / "hf", tmp_path / "x.nemo")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_every_file_travels_there_and_back(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, nemo, back = tmp_path / "hf", tmp_path / "model.nemo", tmp_path / "back"
    shutil.copytree(model, source)
    (source / "vocab.txt").write_text("a\nb\n")
    sentencepiece_file(tmp_path, "bpe").rename(source / "spiece.model")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }} with tools")
    for name in ("tokenization_own.py", "README.md", ".gitattributes", "notes.txt"):
        (source / name).write_text("x")
    hf_to_nemo(source, nemo)
    assert "not carried into the archive: notes.txt, tokenization_own.py" in caplog.text
    for _ in ("new", "over it"):
        nemo_to_hf(nemo, back, overwrite=True)
    for name in ("vocab.txt", "spiece.model", "additional_chat_templates/tools.jinja", "tokenizer.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    exported = load_tokenizer({"library": "huggingface", "type": str(back)}, back)
    assert exported.chat_template == {"default": CHAT_TEMPLATE, "tools": "{{ messages }} with tools"}
    (back / "additional_chat_templates" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="no folder of an earlier export"):
        nemo_to_hf(nemo, back, overwrite=True)


def test_the_class_is_chosen_as_beside_the_model(model: Path, tmp_path: Path) -> None:
    """GPT-2's own tokenizer_config.json names none, and no end token: its config.json does."""
    source = tmp_path / "hf"
    two_files(model, source)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    copy_hf_files(source, tmp_path / "copy")
    ours, theirs = (load_tokenizer({"library": "huggingface", "type": str(f)}, f) for f in (source, tmp_path / "copy"))
    assert differences(ours, theirs) == [] and theirs.special_tokens == {"<|endoftext|>"}


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Any:
    """The tests' tokenizer after `change` to its two files."""
    save_tokenizer(folder)
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    contents = [json.loads(file.read_text()) for file in files]
    change(*contents)
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content))
    return load_tokenizer({"library": "huggingface", "type": str(folder)}, folder)


def another_token(tokenizer: dict[str, Any], _: dict[str, Any]) -> None:
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<|tool|>"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _, config: config.update(eos_token="<|endoftext|>"), "the token eos is 2 and 0"),
        (lambda _, config: config.update(bos_token="<|im_end|>"), "the token bos is 1 and 2"),
        (lambda _, config: config.update(pad_token="<|endoftext|>"), "the token pad is None and 0"),
        (another_token, "'<|tool|>' (None and 300) among them"),
    ],
    ids=["end", "beginning", "padding", "an added token"],
)
def test_what_no_plain_text_shows(tmp_path: Path, change: Any, said: str) -> None:
    save_tokenizer(tmp_path / "a")
    plain = load_tokenizer({"library": "huggingface", "type": str(tmp_path / "a")}, tmp_path)
    other = changed(tmp_path / "b", change)
    assert any(said in line for line in differences(plain, other))
    assert not any("texts" in line for line in differences(plain, other))
    assert differences(plain, plain) == []


def test_another_chat_template(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_tokenizer(tmp_path / name)
    (tmp_path / "b" / "chat_template.jinja").write_text(CHAT_TEMPLATE + " ")
    one, other = (load_tokenizer({"library": "huggingface", "type": str(tmp_path / n)}, tmp_path) for n in ("a", "b"))
    assert differences(one, other) == ["other chat templates"]


def test_symbols_that_a_user_of_sentencepiece_defined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Hugging Face's way of tokens that are taken out of a text cuts it in two; SentencePiece goes on."""
    file = sentencepiece_file(tmp_path, "bpe")
    section = {"library": "sentencepiece", "model": str(file)}
    (tmp_path / "out").mkdir()
    export_tokenizer(section, tmp_path, tmp_path / "out")
    assert "bpe.model: the tokenizer that was written of it makes other ids for 1 of 1 texts" in caplog.text
    written = load_tokenizer({"library": "huggingface", "type": str(tmp_path / "out")}, tmp_path)
    assert len(differences(load_tokenizer(section, tmp_path), written)) == 1


def test_no_tokenizer_is_another_thing_than_a_damaged_one(tmp_path: Path) -> None:
    for section in ({}, {"library": "huggingface", "type": str(tmp_path)}):
        with pytest.raises(NoTokenizerError):
            load_tokenizer(section, tmp_path)
