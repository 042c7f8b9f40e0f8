"""Archives that are broken or mean harm: each entry turns a good `.nemo` into one, and says what must be found.

An entry is (make, match). `make(folder, path)` gets a good extracted archive to spoil and writes the archive `path`;
the message of the refusal must match `match`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import Metadata

from tests.support.layouts import write_one_file, write_zarr

Make = Callable[[Path, Path], object]
Entry = tuple[Make, str]
MARK = "evil"  # what a successful attack leaves behind, in the folder of the archive


class Evil:
    """Unpickling an instance runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def pack(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=".")
    return path


def with_members(*members: tarfile.TarInfo | tuple[str, bytes], mode: str = "w") -> Make:
    """The good archive with something in front."""

    def make(folder: Path, path: Path) -> None:
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            for member in members:
                if isinstance(member, tarfile.TarInfo):
                    tar.addfile(member)
                else:
                    info = tarfile.TarInfo(member[0].format(here=path.parent))
                    info.size = len(member[1])
                    tar.addfile(info, io.BytesIO(member[1]))
            tar.add(folder, arcname=".")

    return make


def special(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def raw(*blocks: bytes, wrap: Callable[[bytes], bytes] = bytes) -> Make:
    """An archive of exactly these bytes, padded as tar pads."""
    data = b"".join(block + bytes(-len(block) % 512) for block in blocks) + bytes(1024)
    return lambda _folder, path: path.write_bytes(wrap(data))


def header(name: str, kind: bytes, size: int, **pax: str) -> bytes:
    info = special(name, kind, size=size)
    info.pax_headers = pax
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def negative() -> bytes:
    """A header whose size is -512 in base 256, with its checksum."""
    block = bytearray(header("./model_weights/x", tarfile.REGTYPE, 0))
    block[124:136] = (-512 & (2**96 - 1)).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def spoil(damage: Callable[[Path], object], mode: str = "w") -> Make:
    """The good archive after `damage` to its extracted folder."""

    def make(folder: Path, path: Path) -> None:
        damage(folder)
        pack(folder, path, mode)

    return make


def config(**changes: Any) -> Make:
    return edited(lambda stored: stored.update(changes))


def edited(change: Callable[[dict[str, Any]], object]) -> Make:
    """model_config.yaml changed."""

    def damage(folder: Path) -> None:
        file = folder / "model_config.yaml"
        stored = yaml.safe_load(file.read_text())
        change(stored)
        file.write_text(yaml.safe_dump(stored))

    return spoil(damage)


def hf_config(**changes: Any) -> Make:
    """The config.json that model_config.yaml keeps, changed."""
    return edited(lambda stored: stored["huggingface"]["config"].update(changes))


def config_text(text: str | bytes) -> Make:
    raw_text = text.encode() if isinstance(text, str) else text
    return spoil(lambda folder: (folder / "model_config.yaml").write_bytes(raw_text))


def artefact(content: bytes, **section: str) -> Make:
    """A tokenizer that is the file `t` with this content."""

    def make(folder: Path, path: Path) -> None:
        (folder / "t").write_bytes(content)
        config(tokenizer=section)(folder, path)

    return make


def weights_file(name: str, content: bytes | None) -> Make:
    """One file of `model_weights/` replaced, or with None removed."""

    def damage(folder: Path) -> None:
        file = folder / "model_weights" / name
        file.unlink() if content is None else file.write_bytes(content)

    return spoil(damage)


def index(change: Callable[[Any], object]) -> Make:
    """The index of the weights changed."""

    def damage(folder: Path) -> None:
        file = folder / "model_weights" / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        change(metadata)
        file.write_bytes(pickle.dumps(metadata))

    return spoil(damage)


def data_files(name: str) -> Callable[[Any], object]:
    return lambda m: [setattr(info, "relative_path", name) for info in m.storage_data.values()]


def first(metadata: Any, **changes: int | str) -> None:
    for name, value in changes.items():
        setattr(next(iter(metadata.storage_data.values())), name, value)


def first_size(metadata: Any, size: torch.Size) -> None:
    next(iter(metadata.state_dict_metadata.values())).size = size


def evil_index(folder: Path, path: Path) -> None:
    """The index of the weights runs a command when it is unpickled."""
    (folder / "model_weights" / ".metadata").write_bytes(pickle.dumps(Evil(path.parent / MARK)))
    pack(folder, path)


def evil_tensor(folder: Path, path: Path) -> None:
    """The index is good; the file that it names for one tensor runs a command."""
    file = folder / "model_weights" / "__1_0.distcp"
    torch.save(Evil(path.parent / MARK), file)
    change = lambda m: first(m, relative_path=file.name, offset=0, length=file.stat().st_size)  # noqa: E731
    index(change)(folder, path)


def all_data(content: bytes) -> Make:
    """Every data file replaced; the index keeps pointing at where its tensors were."""

    def damage(folder: Path) -> None:
        for file in (folder / "model_weights").glob("*.distcp"):
            file.write_bytes(content + bytes(max(0, file.stat().st_size - len(content))))

    return spoil(damage)


def legacy(change: Callable[[Path], object]) -> Make:
    """The same model in NeMo's one file, spoiled; `change` gets that file."""

    def damage(folder: Path) -> None:
        write_one_file(folder, taken_weights(folder))
        change(folder / "model_weights.ckpt")

    return spoil(damage)


def zarr(change: Callable[[Path], object]) -> Make:
    """The same model as a zarr checkpoint; `change` gets the folder of one array."""

    def damage(folder: Path) -> None:
        write_zarr(folder / "model_weights", taken_weights(folder))
        change(folder / "model_weights" / "model.decoder.layers.mlp.linear_fc1.weight")

    return spoil(damage)


def taken_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the good archive, whose folder of weights is gone afterwards."""
    import shutil

    from nemo_dpo.checkpoint.weights import read_weights

    tensors = dict(read_weights(folder / "model_weights"))
    shutil.rmtree(folder / "model_weights")
    return tensors


def described(**changes: Any) -> Callable[[Path], object]:
    """`.zarray` changed."""

    def change(array: Path) -> None:
        file = array / ".zarray"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """The dictionary of `model_weights.ckpt` changed."""

    def edit(file: Path) -> None:
        stored = torch.load(file)
        changed = change(stored)
        torch.save(stored if changed is None else changed, file)

    return edit


def deflated(source: bytes) -> bytes:
    """The same zip with its records compressed."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    return packed.getvalue()


def truncated(share: float, mode: str = "w") -> Make:
    def make(folder: Path, path: Path) -> None:
        whole = pack(folder, path, mode).read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    return make


def without_end(folder: Path, path: Path) -> None:
    """All members whole, and nothing behind the last."""
    data = pack(folder, path).read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512))


def flipped(share: float) -> Make:
    def make(folder: Path, path: Path) -> None:
        data = bytearray(pack(folder, path, "w:gz").read_bytes())
        data[int(len(data) * share)] ^= 0xFF
        path.write_bytes(data)

    return make


def laughs(levels: int, line: str) -> str:
    """A YAML file in which each key repeats the one before it."""
    lines = ["a0: &a0 [x, x]", *(line.format(n=n, last=n - 1) for n in range(1, levels))]
    return "\n".join(lines)


LONG = b"x" * 511 + b"\0"
MEMBERS: dict[str, Entry] = {
    "climbing": (with_members(("../evil", b"x")), "outside"),
    "climbing from inside": (with_members(("./model_weights/../../evil", b"x")), "outside"),
    "absolute": (with_members(("{here}/evil", b"x")), "outside"),
    "backslash": (with_members(("..\\evil", b"x")), "outside"),
    "symbolic link": (with_members(special("./link", tarfile.SYMTYPE, "/etc/passwd")), "link"),
    "a file through a linked folder": (
        with_members(special("./out", tarfile.SYMTYPE, ".."), ("./out/evil", b"x")), "link"),
    "weights linked to elsewhere": (with_members(special("./model_weights", tarfile.SYMTYPE, "/tmp")), "link"),
    "hard link": (with_members(special("./link", tarfile.LNKTYPE, "/etc/passwd")), "link"),
    "character device": (with_members(special("./null", tarfile.CHRTYPE)), "device"),
    "block device": (with_members(special("./disk", tarfile.BLKTYPE)), "device"),
    "fifo": (with_members(special("./pipe", tarfile.FIFOTYPE)), "device"),
    "sparse": (with_members(special("./sparse", tarfile.GNUTYPE_SPARSE)), "sparse"),
    "a file twice": (with_members(("./model_weights/metadata.json", b"other")), "twice"),
    "a file in place of a folder": (with_members(("./model_weights", b"x")), "cannot be unpacked"),
    "a name too long for a disk": (with_members(("./" + "n" * 300, b"x")), "cannot be unpacked"),
    "a path of many folders": (with_members(("./" + "d/" * 3000 + "x", b"x")), "cannot be unpacked|damaged"),
    "a line break in a name": (with_members(("./../a\nb", b"x")), "outside"),
    "a file of 2^60 bytes": (raw(header("./x", tarfile.REGTYPE, 2**60)), "claims 1152921504606846976 bytes"),
    "a file beyond the end": (raw(header("./x", tarfile.REGTYPE, 4096), b"short"), "claims 4096 bytes"),
    "gzip that claims to expand": (
        raw(header("./x", tarfile.REGTYPE, 2**36), wrap=gzip.compress), "claims 68719476736 bytes"),
    "a name of 2^40 bytes": (raw(header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 2**40)), "a header claims"),
    "pax records of 2^40 bytes": (raw(header("./p", tarfile.XHDTYPE, 2**40)), "a header claims"),
    "gzip with a name that expands": (
        raw(header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 2**30), wrap=gzip.compress), "a header claims"),
    "a negative size": (raw(negative()), "damaged|claims -512"),
    "long names without end": (
        raw(*[header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 512) + LONG] * 3000), "not a .nemo archive"),
    "pax records that are no numbers": (
        raw(header("./x", tarfile.REGTYPE, 0, **{"GNU.sparse.map": "a,b", "GNU.sparse.size": "c"})), "damaged"),
    "no end mark": (without_end, "no end mark"),
    "cut in the middle": (truncated(0.5), "truncated"),
    "gzip cut in the middle": (truncated(0.5, "w:gz"), "truncated"),
    "gzip cut at the end": (truncated(0.9999, "w:gz"), "truncated"),
    "gzip with a flipped bit": (flipped(0.5), "truncated|damaged|cannot be unpacked"),
    "empty": (lambda _folder, path: path.write_bytes(b""), "not a .nemo archive"),
    "text": (lambda _folder, path: path.write_text("not a tar " * 200), "not a .nemo archive"),
}  # fmt: skip
CONFIGS: dict[str, Entry] = {
    "not YAML": (config_text("{"), "not valid YAML"),
    "not UTF-8": (config_text(b"\xff\xfe\x00"), "not valid YAML"),
    "a list": (config_text("- a"), "is a list"),
    "a Python object": (config_text("a: !!python/object/apply:os.system [true]"), "not valid YAML"),
    "an impossible date": (config_text("a: !!timestamp 2001-99-99"), "not valid YAML"),
    "a date that is none": (config_text("a: !!timestamp x"), "not valid YAML"),
    "a truth that is none": (config_text("a: !!bool x"), "not valid YAML"),
    "a number that is none": (config_text("a: !!int ''"), "not valid YAML"),
    "bytes": (config_text("a: !!binary AAAA"), "is a bytes"),
    "a set": (config_text("a: !!set {x}"), "is a set"),
    "a number of 5000 digits": (config_text("a: " + "9" * 5000), "not valid YAML"),
    "nested without end": (config_text("a: " + "[" * 500), "not valid YAML"),
    "aliases that multiply": (config_text(laughs(40, "a{n}: &a{n} [*a{last}, *a{last}]")), "expands to"),
    "references that multiply": (config_text(laughs(40, "a{n}: ['${{a{last}}}', '${{a{last}}}']")), "expands to"),
    "an alias of itself": (config_text("a: &a [*a]"), "contains itself"),
    "references in a circle": (config_text("a: ${b}\nb: ${a}"), "recursion"),
    "a reference that asks for the environment": (config_text("a: ${oc.env:HOME}"), "more than a reference"),
    "too large": (config_text(b"#" * (16 * 2**20 + 1)), "limit"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads"),
    "layers below zero": (config(num_layers=-1), "num_layers"),
    "a width in words": (config(hidden_size="wide"), "hidden_size"),
    "an epsilon in words": (config(layernorm_epsilon="small"), "layernorm_epsilon"),
    "a tokenizer that is a text": (config(tokenizer="gpt2"), "tokenizer is 'gpt2'"),
    "no query groups": (config(num_query_groups=0), "num_query_groups=0 is no whole number"),
    "heads in groups of unequal size": (config(num_query_groups=4), "is no multiple of 4"),
    "more heads than channels": (config(num_attention_heads=720, num_query_groups=1, kv_channels=None), "channels=0"),
    "a vocabulary divisible by nothing": (config(make_vocab_size_divisible_by=0), "make_vocab_size_divisible_by=0"),
    "an infinite epsilon": (config(layernorm_epsilon=float("inf")), "layernorm_epsilon=inf"),
    "a scaling without a factor": (
        config(scale_positional_embedding=True, rope_scaling={"rope_type": "llama3", "factor": None}),
        "lacks rope_scaling.factor",
    ),
    "a scaling in words": (config(rope_scaling="llama3"), "rope_scaling='llama3' is no mapping"),
    "a factor in words": (config(rope_scaling={"rope_type": "llama3", "factor": "x"}), "rope_scaling.factor='x'"),
    "several activations": (config(activation=["gelu"]), "activation=.* is no text"),
    "a bias in words": (config(bias="no"), "bias='no' is no true or false"),
    "a window in words": (config(window_size="x"), "window_size='x'"),
    "several tokenizers": (config(tokenizer={"library": ["huggingface"]}), "tokenizer.library=.* is no text"),
    "a tokenizer of no name": (config(tokenizer={"library": "sentencepiece", "model": "\0"}), "no name of a file"),
    "a tokenizer of too long a name": (
        config(tokenizer={"library": "sentencepiece", "model": "nemo:" + "n" * 300}), "no name of a file"),
    "a config.json that is a list": (config(huggingface={"config": ["llama"]}), "huggingface.config is"),
    "a config.json that is nothing": (config(huggingface={"config": 0}), "huggingface.config is 0"),
    "a config.json that is a text": (config(huggingface={"config": "llama"}), "huggingface.config is"),
    "a generation_config.json that is a list": (
        config(huggingface={"generation_config": [1]}), "huggingface.generation_config is"),
    "a config.json with numbers for keys": (hf_config(id2label={0: "a"}), "has the key 0, expected text"),
    "several model types": (hf_config(model_type=[]), r"model_type=\[\] is not supported"),
    "a number of layer types": (hf_config(layer_types=3), "layer_types=3 is no list"),
    "layers of config.json in words": (hf_config(num_hidden_layers="x"), "num_hidden_layers='x' is no whole number"),
    "RoPE of config.json in words": (hf_config(rope_parameters="default"), "rope_parameters='default' is not one"),
    "several kinds of RoPE": (hf_config(rope_parameters={"rope_type": ["linear"]}), "rope_type=.* is no text"),
    "10^12 layers": (config(num_layers=10**12), "1000000000000"),
    "a SentencePiece model of anything": (
        artefact(b"\x0a\xff" * 500, library="sentencepiece", model="nemo:t"), "no SentencePiece model"),
    "a vocabulary that nests": (artefact(b"[" * 100_000, library="tiktoken", vocab_file="nemo:t"), "no tiktoken"),
    "merges of anything": (
        artefact(b'{"<|endoftext|>": 0}', library="megatron", type="GPT2BPETokenizer", vocab_file="nemo:t",
                 merge_file="nemo:t"), "lines that are no pair|do not fit"),
    "a tokenizer outside": (config(tokenizer={"library": "sentencepiece", "model": "nemo:../../../etc/passwd"}),
                            "is not in the checkpoint"),
}  # fmt: skip
INDEX: dict[str, Entry] = {
    "code in the index": (evil_index, "not trusted"),
    "a tensor that is code": (evil_tensor, "not trusted"),
    "a table of 2^31 objects": (weights_file(".metadata", b"\x80\x02}r\xff\xff\xff\x7f."), "is damaged"),
    "an index without end": (weights_file(".metadata", pickle.dumps(Metadata({}))[:-5]), "is damaged"),
    "an empty index": (weights_file(".metadata", b""), "is damaged"),
    "no index": (weights_file(".metadata", None), "cannot be read"),
    "another object as index": (weights_file(".metadata", pickle.dumps({})), "not the index"),
    "data outside": (index(data_files("../../../etc/passwd")), "outside the folder"),
    "data anywhere": (index(data_files("/etc/passwd")), "outside the folder"),
    "data missing": (index(data_files("__9_0.distcp")), "missing"),
    "data cut": (index(lambda m: first(m, length=10**9)), "truncated"),
    "data before the file": (index(lambda m: first(m, offset=-5)), "truncated"),
    "places that are no numbers": (index(lambda m: first(m, offset="x")), "is damaged"),
    "entries that are none": (index(lambda m: m.storage_data.update({"x": "y"})), "is damaged"),
    "a tensor of 10^15 values": (index(lambda m: first_size(m, torch.Size([10**15]))), "claims"),
    "data of zeros": (all_data(b""), "is damaged"),
    "no kind": (weights_file("metadata.json", None), "holds no metadata.json"),
    "an unknown kind": (weights_file("metadata.json", b'{"sharded_backend": "x"}'), "kind 'x'"),
    "a kind that nests": (weights_file("metadata.json", b"[" * 100_000), "not readable"),
} | {
    f"index asks for {name}": (weights_file(".metadata", payload), "not trusted")
    for name, payload in {
        "os.system": b"cos\nsystem\n(S'true'\ntR.",
        "eval": b"cbuiltins\neval\n(S'1'\ntR.",
        "torch.load": b"ctorch\nload\n(S'x'\ntR.",
        "torch.serialization.load": b"ctorch.serialization\nload\n(S'x'\ntR.",
        "a module's import": b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'true'\ntR.",
        "pathlib's import": b"cpathlib\nos.system\n(S'true'\ntR.",
    }.items()
}  # fmt: skip
OLD_LAYOUTS: dict[str, Entry] = {
    "one file that is code": (legacy(lambda file: torch.save(Evil(file.parents[1] / MARK), file)), "not trusted"),
    "one file of no zip": (legacy(lambda file: file.write_bytes(b"x" * 5000)), "damaged or not trusted"),
    "one file cut": (legacy(lambda file: os.truncate(file, file.stat().st_size // 2)), "damaged or not trusted"),
    "one file with packed records": (legacy(lambda file: file.write_bytes(deflated(file.read_bytes()))), "compressed"),
    "one file with a tensor of 4 GB in 4 bytes": (
        legacy(state(lambda s: s.update(x=torch.zeros(1).expand(10**9)))), "claims 4000000000 bytes"),
    "one file with a dictionary inside": (legacy(state(lambda s: {"state_dict": s})), "no flat dictionary"),
    "one file with a list": (legacy(state(lambda s: list(s.values()))), "no flat dictionary"),
    "one file without a layer": (
        legacy(state(lambda s: [s.pop(name) for name in list(s) if ".layers.1." in name] and s)), "not 0 and up"),
    "a rank without its file": (
        legacy(lambda file: (file.unlink(), (file.parent / "mp_rank_00").mkdir())), "mp_rank_00"),
    "a link where a rank should be": (
        legacy(lambda file: (file.unlink(), (file.parent / "mp_rank_00").symlink_to("/tmp"))), "link"),
    "zarr with code to unpack it": (
        zarr(described(dtype="|O", filters=[{"id": "pickle", "protocol": 4}])), "no uncompressed array"),
    "zarr with a filter": (zarr(described(filters=[{"id": "pickle"}])), "no uncompressed array"),
    "zarr compressed": (zarr(described(compressor={"id": "blosc"})), "no uncompressed array"),
    "zarr of another format": (zarr(described(zarr_format=3)), "no uncompressed array"),
    "zarr of 10^15 values": (zarr(described(shape=[10**5, 10**5, 10**5])), "are described"),
    "zarr with huge chunks": (zarr(described(chunks=[10**5, 10**5, 10**5])), "expected 4"),
    "zarr with chunks of nothing": (zarr(described(chunks=[0, 0, 0])), "no uncompressed array"),
    "zarr without a chunk": (zarr(lambda array: (array / "1.0.0").unlink()), "files are there|has None bytes"),
    "zarr with a chunk cut": (zarr(lambda array: os.truncate(array / "1.0.0", 10)), "has 10 bytes"),
    "zarr without a description": (zarr(lambda array: (array / ".zarray").write_text("{")), "is damaged"),
    "zarr without an array": (zarr(lambda array: (array / ".zarray").unlink()), "1 missing"),
}  # fmt: skip
ALL: dict[str, Entry] = {**MEMBERS, **CONFIGS, **INDEX, **OLD_LAYOUTS}
