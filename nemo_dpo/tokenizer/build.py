"""Tokenizers that come as bare vocabularies, built as fast tokenizers of transformers.

Three forms: GPT-2's `vocab.json` and `merges.txt`; NeMo's tiktoken file, a JSON list of tokens by rank; a SentencePiece
model. Each is parsed here from its published form and put together from the parts of the `tokenizers` library.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_dpo.tokenizer.load import USER_DEFINED

END_OF_TEXT = "<|endoftext|>"
# NeMo's tiktoken tokenizer: the pattern that splits a text, the tokens before those of the file, and the most ids.
TIKTOKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
TIKTOKEN_SPECIAL_COUNT = 1000
TIKTOKEN_VOCAB = 2**17
SPACE = "▁"  # SentencePiece's sign for one
BPE_MODEL, UNIGRAM_MODEL = 2, 1  # SentencePiece's numbers of its kinds of model
CONTROL = 3  # and of a kind of piece


def gpt2_bpe(vocab_file: Path, merge_file: Path) -> Any:
    """GPT-2's byte-level BPE.

    Raises:
        ValueError, OSError: the files are not of that form, or have no end-of-text token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    if not isinstance(vocab, dict) or END_OF_TEXT not in vocab:
        raise ValueError(f"{vocab_file.name} is no vocabulary with the token {END_OF_TEXT}")
    lines = merge_file.read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{merge_file.name} has lines that are no pair of tokens")
    core = Tokenizer(_bpe(models, vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _byte_level(core, bos=END_OF_TEXT, eos=END_OF_TEXT, unk=END_OF_TEXT)


def tiktoken_bpe(vocab_file: Path) -> Any:
    """NeMo's tiktoken tokenizer: special tokens first, then those of the file by rank, as many as there is room for.

    Raises:
        ValueError, OSError: the file is not of that form.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    tokens = _ranked(json.loads(vocab_file.read_text(encoding="utf-8")), vocab_file)
    special = [*TIKTOKEN_SPECIAL, *(f"<SPECIAL_{n}>" for n in range(len(TIKTOKEN_SPECIAL), TIKTOKEN_SPECIAL_COUNT))]
    letters = _byte_letters()
    texts = ["".join(letters[byte] for byte in token) for token in tokens]
    vocab = {text: number for number, text in enumerate([*special, *texts])}
    merges = _merges({text: rank for rank, text in enumerate(texts)})
    core = Tokenizer(_bpe(models, vocab, merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TIKTOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return _byte_level(core, bos="<s>", eos="</s>", unk="<unk>", pad="<pad>")


def sentencepiece_fast(model_file: Path) -> Any:
    """A SentencePiece model of the kinds BPE and unigram, with its own handling of white space.

    Raises:
        ValueError, OSError: no such model, or one of another kind.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    proto: Any = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model_file.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{model_file.name} is no SentencePiece model") from error
    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type == BPE_MODEL:
        vocab = {piece.piece: number for number, piece in enumerate(pieces)}
        ranks = {piece.piece: -piece.score for piece in pieces if piece.type not in (CONTROL, USER_DEFINED)}
        unknown = pieces[trainer.unk_id].piece
        core = Tokenizer(
            _bpe(models, vocab, _merges(ranks), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
        )
    elif trainer.model_type == UNIGRAM_MODEL:
        scores = [(piece.piece, piece.score) for piece in pieces]
        core = Tokenizer(models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    else:
        raise ValueError(f"{model_file.name} is a SentencePiece model of words or characters; only BPE and unigram can")
    core.normalizer = _sentencepiece_normalizer(proto.normalizer_spec)
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    _add_special(core, pieces)
    names = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
    tokens = {f"{name}_token": pieces[number].piece for name, number in names.items() if number >= 0}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **tokens)


def _add_special(core: Any, pieces: Sequence[Any]) -> None:
    """Control tokens, and what the model's maker defined, are taken out of a text before all else."""
    from tokenizers import AddedToken

    core.add_special_tokens([AddedToken(p.piece, special=True, normalized=False) for p in pieces if p.type == CONTROL])
    core.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == USER_DEFINED])


def _sentencepiece_normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _bpe(models: Any, vocab: Mapping[str, int], merges: Iterable[tuple[str, ...]], **options: Any) -> Any:
    try:
        return models.BPE(vocab=dict(vocab), merges=list(merges), **options)
    except Exception as error:  # what tokenizers raises is a bare Exception
        raise ValueError(f"the vocabulary and its merges do not fit ({error})") from error


def _byte_level(core: Any, **special: str) -> Any:
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    core.decoder = decoders.ByteLevel()
    tokens = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **tokens)


def _merges(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order in which they are to be made.

    A vocabulary with ranks says which token comes first, not of which two: all ways are listed, those of the
    lower-ranked parts first.
    """
    pairs = [
        (rank, ranks[text[:cut]], ranks[text[cut:]], text[:cut], text[cut:])
        for text, rank in ranks.items()
        for cut in range(1, len(text))
        if text[:cut] in ranks and text[cut:] in ranks
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _ranked(entries: Any, file: Path) -> list[bytes]:
    """The tokens of a tiktoken file by rank, each once, single bytes first."""
    room = TIKTOKEN_VOCAB - TIKTOKEN_SPECIAL_COUNT
    try:
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries[:room]]
        ranks = [entry["rank"] for entry in entries[:room]]
    except (TypeError, LookupError, ValueError) as error:
        raise ValueError(f"{file.name} is no list of tokens with rank and token_bytes") from error
    if ranks != list(range(len(tokens))) or tokens[:256] != [bytes([n]) for n in range(256)]:
        raise ValueError(f"{file.name}: the ranks do not count from 0, or do not begin with the 256 single bytes")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{file.name}: holds a token twice")
    return tokens


def _byte_letters() -> list[str]:
    """What stands for each byte in byte-level vocabularies: its letter if it has one, else one from 256 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]
