"""Which tokenizer a checkpoint has, and how to load it and write it for Hugging Face.

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

# NeMo's library and type (None: any) → the form of its files; Hugging Face's own is not among them.
FORMS: dict[tuple[Any, Any], str] = {
    ("huggingface", "gpt2"): "gpt2",
    ("megatron", "GPT2BPETokenizer"): "gpt2",
    ("megatron", "GPTSentencePieceTokenizer"): "sentencepiece",
    ("sentencepiece", None): "sentencepiece",
    ("tiktoken", None): "tiktoken",
}
FILE_KEYS = {"gpt2": ("vocab_file", "merge_file"), "sentencepiece": ("model",), "tiktoken": ("vocab_file",)}
# Texts that tell tokenizers apart: scripts, digits, code, white space at either end and inside, special tokens.
PROBE = (
    "The fox's 3.14159, naïve café; Straße ﬁ ½",
    "Ελληνικά, кириллица, 東京タワー, العربية, हिन्दी नमस्ते, 한국어, 🙂👩‍👩‍👧",
    "def add(a, b):\n    return a**2 + b[1889]  # 2 + 2 == 4\n\n\n\t1. x\r\n",
    "  two before, three   inside, one behind ",
    "\n\n1. first\n",
    "12345 6 78",
)

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

    @classmethod
    def from_name(cls, source: Path | str, *, use_fast: bool = True) -> HuggingFaceTokenizer:
        """Read a folder, or what a hub id names."""
        from transformers import AutoTokenizer

        local = Path(source).is_dir()
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), use_fast=use_fast, local_files_only=local, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise TokenizerError(f"{source}: no tokenizer that transformers can read ({_reason(error)})") from error
        return cls(tokenizer, str(source), _hf_files(Path(source)) if local else ())

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
        config: the section.
        folder: the extracted `.nemo`, where `nemo:` artefacts lie.

    Raises:
        TokenizerError: unknown library, missing key or artefact, unreadable tokenizer, no end token.
    """
    form = _form(config)
    if form == "sentencepiece":
        return SentencePieceTokenizer(_file(config, "model", folder))
    if form == "huggingface":
        source = resolve_artefact(_needed(config, "type"), folder)
        return HuggingFaceTokenizer.from_name(source, use_fast=bool(config.get("use_fast", True)))
    return _built(form, [_file(config, key, folder) for key in FILE_KEYS[form]])


def export_tokenizer(config: Mapping[str, Any], folder: Path, target: Path) -> None:
    """Write a checkpoint's tokenizer into the Hugging Face folder `target`.

    What is no Hugging Face tokenizer is built anew as one, read back and compared on a text of many kinds.

    Raises:
        TokenizerError: as `load_tokenizer`, or it cannot be written so that it gives the same tokens.
    """
    form = _form(config)
    if form == "huggingface":
        source = resolve_artefact(_needed(config, "type"), folder)
        if not Path(source).is_dir():
            raise TokenizerError(f"tokenizer {str(source)!r} is not in the checkpoint; name a folder with its files")
        copy_hf_files(Path(source), target)
        return
    original, first = load_tokenizer(config, folder), _file(config, FILE_KEYS[form][0], folder)
    fast = original if isinstance(original, HuggingFaceTokenizer) else _built(form, [first])
    fast.save(target)
    written = HuggingFaceTokenizer.from_name(target)
    differ = [text for text in PROBE if written.encode(text) != original.encode(text)]
    if differ or written.eos_id != original.eos_id:
        raise TokenizerError(f"{first.name}: a Hugging Face tokenizer made of it gives other tokens for {differ[:2]}")
    if form == "sentencepiece":
        (target / "tokenizer.model").write_bytes(first.read_bytes())


def _form(config: Mapping[str, Any]) -> str:
    """Which of FILE_KEYS, or `huggingface`."""
    library, kind = config.get("library"), config.get("type")
    if library == "huggingface" and not (config.get("vocab_file") or config.get("merge_file")):
        return "huggingface"
    form = FORMS.get((library, kind)) or FORMS.get((library, None))
    if form is None:
        known = ", ".join(sorted({f"{name} ({only})" if only else str(name) for name, only in FORMS} | {"huggingface"}))
        raise TokenizerError(f"tokenizer.library={library!r} with type={kind!r} is not supported, only {known}")
    return form


def _built(form: str, files: Sequence[Path]) -> HuggingFaceTokenizer:
    from nemo_dpo.tokenizer import build

    make: dict[str, Callable[..., Any]] = {
        "gpt2": build.gpt2_bpe,
        "tiktoken": build.tiktoken_bpe,
        "sentencepiece": build.sentencepiece_fast,
    }
    try:
        return HuggingFaceTokenizer(make[form](*files), str(files[0]), files)
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{files[0]}: no {form} tokenizer ({_reason(error)})") from error


def _file(config: Mapping[str, Any], key: str, folder: Path) -> Path:
    path = Path(resolve_artefact(_needed(config, key), folder))
    if not path.is_file():
        raise TokenizerError(f"model_config.yaml: tokenizer.{key}={config[key]!r} is no file")
    return path


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def resolve_artefact(value: str, folder: Path) -> Path | str:
    """`nemo:<name>` → the path of that artefact in `folder`; any other value is returned as it is."""
    if not value.startswith(ARTEFACT):
        return value
    name = value.removeprefix(ARTEFACT)
    path = folder / name
    if name in ("", "..") or Path(name).name != name or not path.exists():
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
