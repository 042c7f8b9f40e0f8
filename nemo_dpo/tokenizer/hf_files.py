"""The files of a Hugging Face tokenizer: which they are, whether they are whole, and their way into another folder."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_dpo.json_file import parse_object
from nemo_dpo.one_line import one_line

HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
"""Every file that a Hugging Face tokenizer may consist of, besides TEMPLATES; code is not among them."""
TEMPLATES = "additional_chat_templates"  # a folder of further templates by name
# transformers chooses a tokenizer's class by the model's config.json, too: it goes along, and is no file of HF_FILES.
MODEL_FILE = "config.json"
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")  # a `tokenizer.model` may be of that form


class TokenizerError(ValueError):
    """A tokenizer is damaged or lacks what is asked of it."""


class NoTokenizerError(TokenizerError):
    """There is none."""


def hf_files(folder: Path) -> list[Path]:
    """The tokenizer's files in `folder`, in a fixed order."""
    files = [folder / name for name in HF_FILES]
    return [file for file in files if file.is_file()] + sorted(folder.glob(f"{TEMPLATES}/*.jinja"))


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy the files of a Hugging Face tokenizer, and MODEL_FILE if `target` has none, from one folder into another.

    Raises:
        TokenizerError: `source` holds no tokenizer, or one that cannot be read.
    """
    files = needed_files(source)
    model = source / MODEL_FILE
    if model.is_file() and not (target / MODEL_FILE).exists():
        files.append(model)
    for file in files:
        content = _content(file)
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)


def needed_files(folder: Path) -> list[Path]:
    """As `hf_files`.

    Raises:
        NoTokenizerError: there are none.
    """
    files = hf_files(folder)
    if not files:
        raise NoTokenizerError(f"{folder}: holds no tokenizer (tokenizer.json or the like); copy its files there")
    return files


def check_whole(file: Path) -> None:
    """Refuse a file that is cut off: the reader of a tokenizer passes over files that it can do without.

    Raises:
        TokenizerError: it is damaged.
    """
    try:
        if file.suffix == ".json":
            parse_object(_content(file))
        elif file.suffix == ".model":
            _check_model(_content(file))
        elif file.suffix in (".txt", ".jinja"):
            _content(file).decode("utf-8")
    except TokenizerError:
        raise
    except (ValueError, RuntimeError) as error:
        raise TokenizerError(f"{file}: truncated or damaged ({one_line(error)}); copy it again") from error


def _check_model(content: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    if not TIKTOKEN_LINE.match(content):
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(content)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror or error})") from error
