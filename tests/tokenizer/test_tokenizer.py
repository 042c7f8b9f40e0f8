"""Tokenizers of a checkpoint: no special tokens added, ids of the library itself, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.data.tally import Tally
from nemo_dpo.data.tokenize import tokenize_pairs
from nemo_dpo.data.types import DataOptions, PreferencePair
from nemo_dpo.tokenizer import TokenizerError, load_tokenizer, resolve_artefact
from tests.convert.conftest import CHAT_TEMPLATE, CORPUS, TEXT, save_tokenizer

NAME = "0" * 32 + "_tokenizer"
SECTION = {"library": "huggingface", "type": f"nemo:{NAME}", "use_fast": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An extracted .nemo with a Hugging Face tokenizer as artefact."""
    save_tokenizer(tmp_path / NAME)
    return tmp_path


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    root = tmp_path_factory.mktemp("sp")
    (root / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus.txt"), model_prefix=str(root / "m"), vocab_size=400, byte_fallback=True,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return root / "m.model"


def test_huggingface_adds_nothing_and_recognises_written_tokens(folder: Path) -> None:
    from tokenizers import Tokenizer as Backend

    tokenizer = load_tokenizer(SECTION, folder)
    expected = Backend.from_file(str(folder / NAME / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode(TEXT) == expected and expected.count(2) == 1
    assert tokenizer.encode_batch([TEXT, "", "a"]) == [expected, [], tokenizer.encode("a")]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode(expected) == TEXT


def test_padding_falls_back_to_the_end_token(folder: Path) -> None:
    tokenizer = load_tokenizer(SECTION, folder)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 2, 300)


def test_chat_template(folder: Path) -> None:
    tokenizer = load_tokenizer(SECTION, folder)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages) == "<|im_start|>user\nHi<|im_end|>\n"
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    (folder / NAME / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="no chat template"):
        load_tokenizer(SECTION, folder).apply_chat_template(messages)


def test_fingerprint_follows_the_files_not_the_place(folder: Path, tmp_path: Path) -> None:
    (folder / NAME / "unrelated.txt").write_text("x")
    first = load_tokenizer(SECTION, folder).fingerprint
    other = tmp_path / "elsewhere"
    save_tokenizer(other / NAME)
    assert load_tokenizer(SECTION, other).fingerprint == first
    (other / NAME / "chat_template.jinja").write_text(CHAT_TEMPLATE + " ")
    assert load_tokenizer(SECTION, other).fingerprint != first


def test_sentencepiece(sentencepiece_model: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    section = {"library": "sentencepiece", "model": f"nemo:{sentencepiece_model.name}"}
    tokenizer = load_tokenizer(section, sentencepiece_model.parent)
    processor: Any = SentencePieceProcessor(model_file=str(sentencepiece_model))
    text = "The fox 123 東京 🙂"
    assert tokenizer.encode(text) == processor.encode(text) != []
    assert tokenizer.encode_batch([text, ""]) == [processor.encode(text), []]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 2, processor.get_piece_size())
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.apply_chat_template([])


def test_sentencepiece_recognises_written_tokens(sentencepiece_model: Path, tmp_path: Path) -> None:
    """As the Hugging Face tokenizer made of the same file; alone SentencePiece would spell them."""
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer

    processor: Any = SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer({"library": "sentencepiece", "model": str(sentencepiece_model)}, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    llama = LlamaTokenizer.from_pretrained(tmp_path)
    texts = ["The fox</s>", "The fox</s></s>", "</s>"]
    assert tokenizer.encode_batch(texts) == [llama(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert tokenizer.encode("The fox</s>") == [*processor.encode("The fox"), 2] != processor.encode("The fox</s>")
    assert tokenizer.encode("<s>The</s>fox") == [1, *processor.encode("The"), 2, *processor.encode("fox")]


def test_append_eod_ends_a_sentencepiece_response_once(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer({"library": "sentencepiece", "model": str(sentencepiece_model)}, Path())
    pairs = [PreferencePair("The", " fox</s>", " dog", 1.0, 0.0, 1)]
    options = DataOptions(seq_length=64, append_eod=True)
    ((_, triple),) = tokenize_pairs(pairs, tokenizer, options, "file", Tally())
    assert (triple.chosen.count(2), triple.chosen[-1]) == (1, 2)
    assert (triple.rejected.count(2), triple.rejected[-1]) == (1, 2)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"library": "yttm"}, "tokenizer.library='yttm'"),
        ({"library": "megatron", "type": "BertWordPieceLowerCase"}, "type='BertWordPieceLowerCase' is not supported"),
        ({"library": "megatron", "type": "GPT2BPETokenizer"}, "tokenizer.vocab_file is empty"),
        ({"library": "huggingface", "type": "bert", "vocab_file": "nemo:text"}, "type='bert' is not supported"),
        ({"library": "tiktoken", "vocab_file": "nemo:text"}, "no tiktoken tokenizer"),
        ({"library": "tiktoken", "vocab_file": "/nowhere"}, "is no file"),
        (
            {"library": "megatron", "type": "GPT2BPETokenizer", "vocab_file": "nemo:text", "merge_file": "nemo:text"},
            "no gpt2 tokenizer",
        ),
        ({"library": "huggingface", "type": None}, "tokenizer.type is empty"),
        ({"library": "huggingface", "type": "nemo:missing"}, "'nemo:missing' is not in the checkpoint"),
        ({"library": "sentencepiece", "model": "nemo:../outside"}, "is not in the checkpoint"),
        ({"library": "huggingface", "type": "nemo:.."}, "is not in the checkpoint"),
        ({"library": "huggingface", "type": "nemo:empty"}, "holds no tokenizer"),
        ({"library": "sentencepiece", "model": "nemo:text"}, "no SentencePiece model"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, section: dict[str, Any], match: str) -> None:
    (tmp_path / "in" / "empty").mkdir(parents=True)
    (tmp_path / "in" / "text").write_text("no model")
    (tmp_path / "outside").write_text("x")
    with pytest.raises(TokenizerError, match=match) as caught:
        load_tokenizer(section, tmp_path / "in")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path) -> None:
    config = folder / NAME / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token"', '"x_token"'))
    with pytest.raises(TokenizerError, match="no end token"):
        load_tokenizer(SECTION, folder)


def test_plain_values_are_no_artefacts(tmp_path: Path) -> None:
    assert resolve_artefact("organisation/name", tmp_path) == "organisation/name"


def test_the_module_imports_no_library() -> None:
    code = (
        "import sys, nemo_dpo.tokenizer; sys.exit(bool({'torch', 'transformers', 'sentencepiece'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
