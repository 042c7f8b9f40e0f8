"""Which tokenizer a checkpoint has, and how to load it.

The section `tokenizer` of model_config.yaml says which, in NeMo's words:

    library      type                                        files
    huggingface  nemo:<artefact folder>, a folder, a hub id
    huggingface  gpt2                                        vocab_file, merge_file
    megatron     GPT2BPETokenizer                            vocab_file, merge_file
    megatron     GPTSentencePieceTokenizer                   model
    sentencepiece                                            model
    tiktoken                                                 vocab_file

A file is `nemo:<artefact>` or a path. The libraries are imported when one of their tokenizers is loaded. Special tokens
are never added to a text; those written out in it are recognised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from nemo_dpo.data.tokenize import Tokenizer as DataTokenizer
from nemo_dpo.one_line import one_line
from nemo_dpo.tokenizer.hf_files import (
    NoTokenizerError,
    TokenizerError,
    check_whole,
    needed_files,
)

ARTEFACT = "nemo:"
NAME_MAX, PATH_MAX = 255, 4095  # of Linux; asking for longer ones is another error than that they are missing
# NeMo's library and type (None: any) → the form of its files; Hugging Face's own is not among them.
FORMS: dict[tuple[Any, Any], str] = {
    ("huggingface", "gpt2"): "gpt2",
    ("megatron", "GPT2BPETokenizer"): "gpt2",
    ("megatron", "GPTSentencePieceTokenizer"): "sentencepiece",
    ("sentencepiece", None): "sentencepiece",
    ("tiktoken", None): "tiktoken",
}
TEXTS = ("library", "type", "model", "vocab_file", "merge_file")
FILE_KEYS = {"gpt2": ("vocab_file", "merge_file"), "sentencepiece": ("model",), "tiktoken": ("vocab_file",)}
USER_DEFINED = 4  # SentencePiece's number of a kind of piece
ROLES = ("bos", "eos", "pad", "unk")

Messages = Sequence[Mapping[str, str]]


class Tokenizer(DataTokenizer, Protocol):
    """What a checkpoint's tokenizer can do beside making tokens of data.

    `pad_id` is the end token where there is no padding token: never mask by it. `fingerprint` is the SHA-256 over the
    tokenizer's files. `roles` are the ids of bos, eos, pad and unk, None where there is none; `special_tokens` those
    of control that are recognised where they are written out, `added_tokens` other such tokens; `chat_template` the
    template or, where there are several, each by its name.
    """

    roles: Mapping[str, int | None]
    special_tokens: frozenset[str]
    added_tokens: frozenset[str]
    chat_template: Any

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model may have more rows than that."""

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, None for any other text."""

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Messages (`role`, `content`) as one text in the form that the model was trained on."""


class HuggingFaceTokenizer:
    """A tokenizer of transformers; never runs code that lies beside it."""

    def __init__(self, tokenizer: Any, label: str, files: Sequence[Path] = ()) -> None:
        """Wrap a tokenizer of transformers; `files` are what it was made of, `label` names it in messages."""
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise TokenizerError(f"{label}: the tokenizer has no end token (eos); name one in tokenizer_config.json")
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocab_size: int = len(tokenizer)
        self.fingerprint: str = _fingerprint(files, label)
        self.roles: Mapping[str, int | None] = {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
        added = tokenizer.added_tokens_decoder.values()
        self.special_tokens: frozenset[str] = frozenset(token.content for token in added if token.special)
        self.added_tokens: frozenset[str] = frozenset(token.content for token in added if not token.special)
        self.chat_template: Any = tokenizer.chat_template

    @classmethod
    def from_name(cls, source: Path | str, *, use_fast: bool = True) -> HuggingFaceTokenizer:
        """Read a folder, or what a hub id names.

        Raises:
            NoTokenizerError: the folder holds no tokenizer.
            TokenizerError: one of its files is damaged, or transformers cannot read it.
        """
        from transformers import AutoTokenizer

        local = Path(source).is_dir()
        files = needed_files(Path(source)) if local else []
        for file in files:
            check_whole(file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), use_fast=use_fast, local_files_only=local, trust_remote_code=False
            )
        except Exception as error:  # of any kind on files that it did not write; tokenizers raises a bare Exception
            raise TokenizerError(f"{source}: no tokenizer that transformers can read ({one_line(error)})") from error
        return cls(tokenizer, str(source), files)

    def save(self, folder: Path) -> None:
        """Write it as transformers does."""
        self._tokenizer.save_pretrained(folder)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def token_id(self, token: str) -> int | None:
        found: int | None = self._vocabulary.get(token)
        return found

    @cached_property
    def _vocabulary(self) -> Mapping[str, int]:
        vocabulary: Mapping[str, int] = self._tokenizer.get_vocab()
        return vocabulary

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        if self.chat_template is None:
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
            raise TokenizerError(f"{model}: no SentencePiece model ({one_line(error)})") from error
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise TokenizerError(f"{model}: the SentencePiece model has no end token (eos)")
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.vocab_size: int = self._processor.get_piece_size()
        self.fingerprint: str = _fingerprint([model], "sentencepiece")
        numbers = filter(self._processor.is_control, range(self.vocab_size))
        self._special: dict[str, int] = {self._processor.id_to_piece(number): number for number in numbers}
        self.special_tokens: frozenset[str] = frozenset(self._special)
        self.added_tokens: frozenset[str] = _user_defined(self._processor)
        ids = {role: getattr(self._processor, f"{role}_id")() for role in ROLES}
        self.roles: Mapping[str, int | None] = {role: None if number < 0 else number for role, number in ids.items()}
        self.chat_template: Any = None
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

    def token_id(self, token: str) -> int | None:
        number = self._processor.piece_to_id(token)  # that of the unknown token for a text that is none
        return number if self._processor.id_to_piece(number) == token else None

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        raise TokenizerError("a SentencePiece model has no chat template; write prompts as plain text")


def load_tokenizer(config: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer that the section `tokenizer` of a model_config.yaml describes.

    Args:
        config: the section.
        folder: the extracted `.nemo`, where `nemo:` artefacts lie.

    Raises:
        NoTokenizerError: the section is empty, or names a folder without a tokenizer.
        TokenizerError: unknown library, missing key or artefact, unreadable tokenizer, no end token.
    """
    if not config:
        raise NoTokenizerError("model_config.yaml has no section tokenizer")
    form = form_of(config)
    if form == "sentencepiece":
        return SentencePieceTokenizer(file_of(config, "model", folder))
    if form == "huggingface":
        return HuggingFaceTokenizer.from_name(hf_source(config, folder), use_fast=bool(config.get("use_fast", True)))
    return build_tokenizer(form, [file_of(config, key, folder) for key in FILE_KEYS[form]])


def form_of(config: Mapping[str, Any]) -> str:
    """Which of FILE_KEYS, or `huggingface`."""
    wrong = [key for key in TEXTS if not isinstance(config.get(key), str | None)]
    if wrong:
        raise TokenizerError(f"model_config.yaml: tokenizer.{wrong[0]}={config[wrong[0]]!r:.80} is no text")
    library, kind = config.get("library"), config.get("type")
    if library == "huggingface" and not (config.get("vocab_file") or config.get("merge_file")):
        return "huggingface"
    form = FORMS.get((library, kind)) or FORMS.get((library, None))
    if form is None:
        known = ", ".join(sorted({f"{name} ({only})" if only else str(name) for name, only in FORMS} | {"huggingface"}))
        raise TokenizerError(f"tokenizer.library={library!r} with type={kind!r} is not supported, only {known}")
    return form


def hf_source(config: Mapping[str, Any], folder: Path) -> Path | str:
    """Where a Hugging Face tokenizer is: a folder, or a hub id."""
    return resolve_artefact(_needed(config, "type"), folder)


def build_tokenizer(form: str, files: Sequence[Path]) -> HuggingFaceTokenizer:
    """A tokenizer of one of FILE_KEYS' forms as one of Hugging Face's, from its files."""
    from nemo_dpo.tokenizer import build

    make: dict[str, Callable[..., Any]] = {
        "gpt2": build.gpt2_bpe,
        "tiktoken": build.tiktoken_bpe,
        "sentencepiece": build.sentencepiece_fast,
    }
    try:
        return HuggingFaceTokenizer(make[form](*files), str(files[0]), files)
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{files[0]}: no {form} tokenizer ({one_line(error)})") from error


def file_of(config: Mapping[str, Any], key: str, folder: Path) -> Path:
    """The file that a key of the section names."""
    path = Path(resolve_artefact(_needed(config, key), folder))
    if not path.is_file():
        raise TokenizerError(f"model_config.yaml: tokenizer.{key}={config[key]!r} is no file")
    return path


def resolve_artefact(value: str, folder: Path) -> Path | str:
    """`nemo:<name>` → the path of that artefact in `folder`; any other value is returned as it is."""
    if not value.startswith(ARTEFACT):
        return value
    name = value.removeprefix(ARTEFACT)
    path = folder / name
    if name in ("", "..") or Path(name).name != name or not path.exists():
        raise TokenizerError(f"tokenizer artefact {value!r} is not in the checkpoint; it is incomplete or not trusted")
    return path


def _needed(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key)
    if not value:
        raise TokenizerError(f"model_config.yaml: tokenizer.{key} is empty, but tokenizer.library needs it")
    text = str(value)
    if "\0" in text or len(text) > PATH_MAX or max(map(len, text.removeprefix(ARTEFACT).split("/"))) > NAME_MAX:
        raise TokenizerError(f"model_config.yaml: tokenizer.{key}={text!r:.80} is no name of a file")
    return text


def _user_defined(processor: Any) -> frozenset[str]:
    """The symbols that the maker of a SentencePiece model defined."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    return frozenset(piece.piece for piece in proto.pieces if piece.type == USER_DEFINED)


def _fingerprint(files: Sequence[Path], label: str) -> str:
    """Digest of names and contents; a tokenizer without local files is known by its `label` only."""
    digest = hashlib.sha256() if files else hashlib.sha256(label.encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
