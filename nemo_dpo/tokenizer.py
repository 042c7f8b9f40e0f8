"""Tokenizers of a checkpoint, behind one small interface: Hugging Face's and SentencePiece's.

The section `tokenizer` of model_config.yaml says which: `library: huggingface` with `type: nemo:<artefact folder>` (or
a folder, or a hub id), `library: sentencepiece` with `model: nemo:<artefact file>`. The libraries are imported when one
of their tokenizers is loaded. Special tokens are never added to a text; those written out in it are recognised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_dpo.data.tokenize import Tokenizer as DataTokenizer

ARTEFACT = "nemo:"
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
)
"""Every file that a Hugging Face tokenizer may consist of; code is not among them."""

Messages = Sequence[Mapping[str, str]]


class TokenizerError(ValueError):
    """A tokenizer is missing, damaged or lacks what is asked of it."""


class Tokenizer(DataTokenizer, Protocol):
    """What a checkpoint's tokenizer can do beside making tokens of data.

    `pad_id` is the end token where there is no padding token: never mask by it. `fingerprint` is the SHA-256 over the
    tokenizer's files.
    """

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model may have more rows than that."""

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Messages (`role`, `content`) as one text in the form that the model was trained on."""


class HuggingFaceTokenizer:
    """A tokenizer of transformers, read from a folder or by hub id; never runs code that lies beside it."""

    def __init__(self, source: Path | str, *, use_fast: bool = True) -> None:
        from transformers import AutoTokenizer

        local = Path(source).is_dir()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(source), use_fast=use_fast, local_files_only=local, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TokenizerError(f"{source}: no tokenizer that transformers can read ({reason})") from error
        if self._tokenizer.eos_token_id is None:
            raise TokenizerError(f"{source}: the tokenizer has no end token (eos); name one in tokenizer_config.json")
        self.eos_id: int = self._tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        self.vocab_size: int = len(self._tokenizer)
        self.fingerprint: str = _fingerprint(_hf_files(Path(source)) if local else [], str(source))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        if self._tokenizer.chat_template is None:
            raise TokenizerError("the tokenizer has no chat template; write prompts as plain text")
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)


class SentencePieceTokenizer:
    """A SentencePiece model file, as NeMo 1.x models and Llama 1 and 2 have it.

    SentencePiece itself takes a written-out `</s>` for letters. Here it is the token, as in the Hugging Face tokenizer
    of the same model; what follows it is encoded as a text of its own.
    """

    def __init__(self, model: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor: Any = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{model}: no SentencePiece model ({str(error).splitlines()[0]})") from error
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise TokenizerError(f"{model}: the SentencePiece model has no end token (eos)")
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.vocab_size: int = self._processor.get_piece_size()
        self.fingerprint: str = _fingerprint([model], "sentencepiece")
        numbers = filter(self._processor.is_control, range(self.vocab_size))
        self._special: dict[str, int] = {self._processor.id_to_piece(number): number for number in numbers}
        self._cut = re.compile(f"({'|'.join(map(re.escape, self._special))})")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cuts = [self._cut.split(text) for text in texts]  # each: plain, special, plain, …, plain
        plain = iter(self._processor.encode([part for cut in cuts for part in cut[::2]]))
        return [
            [token for n, part in enumerate(cut) for token in ([self._special[part]] if n % 2 else next(plain))]
            for cut in cuts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        raise TokenizerError("a SentencePiece model has no chat template; write prompts as plain text")


def load_tokenizer(config: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer that the section `tokenizer` of a model_config.yaml describes.

    Args:
        config: the section: `library`, and `type` (huggingface; with `use_fast`) or `model` (sentencepiece).
        folder: the extracted `.nemo`, where `nemo:` artefacts lie.

    Raises:
        TokenizerError: unknown library, missing key or artefact, unreadable tokenizer, no end token.
    """
    library = config.get("library")
    if library == "huggingface":
        source = resolve_artefact(_needed(config, "type"), folder)
        return HuggingFaceTokenizer(source, use_fast=bool(config.get("use_fast", True)))
    if library == "sentencepiece":
        return SentencePieceTokenizer(Path(resolve_artefact(_needed(config, "model"), folder)))
    raise TokenizerError(f"tokenizer.library={library!r} is not supported, only huggingface and sentencepiece")


def resolve_artefact(value: str, folder: Path) -> Path | str:
    """`nemo:<name>` → the path of that artefact in `folder`; any other value is returned as it is."""
    if not value.startswith(ARTEFACT):
        return value
    name = value.removeprefix(ARTEFACT)
    path = folder / name
    if Path(name).name != name or not path.exists():
        raise TokenizerError(f"tokenizer artefact {value!r} is not in the checkpoint; it is incomplete or not trusted")
    return path


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy the files of a Hugging Face tokenizer from one folder into another.

    Raises:
        TokenizerError: `source` holds no tokenizer.
    """
    files = _hf_files(source)
    if not files:
        raise TokenizerError(f"{source}: holds no tokenizer (tokenizer.json or the like); copy its files there")
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        (target / file.name).write_bytes(file.read_bytes())


def _hf_files(folder: Path) -> list[Path]:
    return [folder / name for name in HF_FILES if (folder / name).is_file()]


def _needed(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key)
    if not value:
        raise TokenizerError(f"model_config.yaml: tokenizer.{key} is empty, but tokenizer.library needs it")
    return str(value)


def _fingerprint(files: Sequence[Path], label: str) -> str:
    """Digest of names and contents; a tokenizer without local files is known by its `label` only."""
    digest = hashlib.sha256() if files else hashlib.sha256(label.encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
