"""Hugging Face folders that are broken or mean harm: each entry spoils a good one, and says what must be found.

An entry is (damage, match). `damage(folder)` gets a tiny Llama in safetensors; the message of the refusal must match
`match`. The values were found by trying each of some twenty wrong ones for every key of every family.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.convert.conftest import hf_tensors
from tests.convert.hostile import MARK, Evil

Damage = Callable[[Path], object]
Entry = tuple[Damage, str]
NORM = "model.norm.weight"  # 72 values in fp32


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def content(name: str, raw: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(raw)


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The header of the safetensors file changed; the data behind it stays."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        changed = change(json.loads(raw[8 : 8 + length]))
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def norm(**changes: Any) -> Damage:
    return header(lambda entries: {**entries, NORM: {**entries[NORM], **changes}})


def older(change: Callable[[bytes], bytes] = bytes, **more: Any) -> Damage:
    """The same weights in a `.bin` file older than torch 1.6, and its bytes changed."""

    def damage(folder: Path) -> None:
        tensors = hf_tensors(folder)
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
        torch.save({**tensors, **more}, file, _use_new_zipfile_serialization=False)
        file.write_bytes(change(file.read_bytes()))

    return damage


def older_object(folder: Path) -> None:
    """A `.bin` file whose object is code."""
    older()(folder)
    torch.save(Evil(folder.parent / MARK), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def claiming(raw: bytes) -> bytes:
    """One storage, of 72 values as the norms' are, made one of 2^40."""
    small, large = b"K\x48N", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"N"  # in a persistent id, before None
    assert small in raw
    return raw.replace(small, large, 1)


NESTED = b'{"a":' * 100_000
CONFIGS: dict[str, Entry] = {
    "config that nests without end": (content("config.json", NESTED), "config.json: not valid JSON .nested without"),
    "config that nests 100 levels": (
        content("config.json", b'{"a":' * 100 + b"1" + b"}" * 100), "nested deeper than 64 levels"),
    "config that is no UTF-8": (content("config.json", b"\xff\xfe{}"), "not valid JSON"),
    "config with half a surrogate pair": (config(note="\ud800"), "not valid JSON"),
    "config that is a list": (content("config.json", b"[]"), "holds a list, expected an object"),
    "generation config that nests": (content("generation_config.json", NESTED), "generation_config.json: not valid"),
    "index that nests": (content("model.safetensors.index.json", NESTED), "index.json: not valid JSON"),
    "index with a list": (content("model.safetensors.index.json", b'{"weight_map": []}'), "has no weight_map"),
    "index that names numbers": (content("model.safetensors.index.json", b'{"weight_map": {"a": 1}}'), "names '1'"),
    "a family that is a list": (config(model_type=[]), r"model_type=\[\] is not supported"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0 is no whole number of 1 or more"),
    "layers below zero": (config(num_hidden_layers=-1), "num_hidden_layers=-1 is no whole number"),
    "layers in words": (config(num_hidden_layers="3"), "num_hidden_layers='3' is no whole number"),
    "half a layer": (config(num_hidden_layers=2.5), "num_hidden_layers=2.5 is no whole number"),
    "true layers": (config(num_hidden_layers=True), "num_hidden_layers=True is no whole number"),
    "10^12 layers": (config(num_hidden_layers=10**12), "says 1000000000000 layers, the weights are 30 tensors"),
    "a number of 400 digits": (config(intermediate_size=10**400), "intermediate_size=1000"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads=0 is no whole number"),
    "no groups": (config(num_key_value_heads=0), "num_key_value_heads=0 is no whole number"),
    "heads in a list": (config(num_attention_heads=[9]), r"num_attention_heads=\[9\] is no whole number"),
    "a width of nothing": (config(hidden_size={}), "hidden_size={} is no whole number"),
    "an epsilon in words": (config(rms_norm_eps="1e-5"), "rms_norm_eps='1e-5' is no number"),
    "an epsilon that is none": (config(rms_norm_eps=float("nan")), "rms_norm_eps=nan is no number"),
    "an infinite spread": (config(initializer_range=float("inf")), "initializer_range=inf is no number"),
    "tied by a number": (config(tie_word_embeddings=1), "tie_word_embeddings=1 is no true or false"),
    "biases in words": (config(attention_bias="no"), "attention_bias='no' is no true or false"),
    "kinds of layers in a number": (config(layer_types=3), "layer_types=3 is no list"),
    "RoPE in words": (config(rope_parameters="default"), "rope_parameters='default' is not one description"),
    "RoPE by kind of layer": (config(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "not one description"),
    "RoPE of a list": (config(rope_parameters={"rope_type": ["linear"]}), "is no text"),
    "a number of the scaling that is null": (
        config(rope_parameters={"rope_type": "llama3", "low_freq_factor": None, "factor": 8.0}),
        "RoPE scaling 'llama3' lacks low_freq_factor",
    ),
    "a linear scaling by nothing": (config(rope_parameters={"type": "linear", "factor": None}), "lacks factor"),
    "theta below zero": (config(rope_parameters={"rope_theta": -1.0}), "rope_theta=-1.0 is no number above 0"),
    "theta in words": (config(rope_parameters={"rope_theta": "1e4"}), "rope_theta='1e4' is no number"),
    "a factor that is none": (
        config(rope_parameters={"rope_type": "linear", "factor": float("nan")}), "factor=nan is no number"),
    "an activation of a million letters": (config(hidden_act="x" * 10**6), "hidden_act='xxxxx"),
}  # fmt: skip
HEADERS: dict[str, Entry] = {
    "header that nests": (header(lambda _: NESTED), "truncated or damaged .nested without end"),
    "header that is a list": (header(lambda _: []), "truncated or damaged .holds a list"),
    "header with half a surrogate pair": (header(lambda _: {"\ud800": {}}), "truncated or damaged"),
    "shape of fractions": (norm(shape=[72.0]), "no list of whole numbers"),
    "shape below zero": (norm(shape=[-1, -72]), "no list of whole numbers"),
    "shape of truths": (norm(shape=[True, 72]), "no list of whole numbers"),
    "shape in words": (norm(shape="72"), "no list of whole numbers"),
    "shape in a list": (norm(shape=[[72]]), "no list of whole numbers"),
    "shape of nothing, beyond all numbers": (norm(shape=[0, 1e30], data_offsets=[0, 0]), "no list of whole numbers"),
    "shape of nothing, beyond all memory": (norm(shape=[0, 10**30], data_offsets=[0, 0]), "not where the header says"),
    "shape that overflows": (norm(shape=[2**32, 2**32, 0], data_offsets=[0, 0]), "not where the header says"),
    "place in words": (norm(data_offsets=["0", "288"]), "no list of whole numbers"),
    "place with one end": (norm(data_offsets=[0]), "truncated or damaged"),
    "place of fractions": (norm(data_offsets=[0.0, 288.0]), "no list of whole numbers"),
    "dtype of a list": (norm(dtype=["F32"]), "truncated or damaged"),
}  # fmt: skip
OLDER: dict[str, Entry] = {
    "older file that is code": (older_object, "damaged or not trusted"),
    "older file with a list in it": (older(note=[1]), "no flat dictionary of tensors: note is a list"),
    "older file with a tensor of 4 GB in 4 bytes": (older(x=torch.zeros(1).expand(10**9)), "has the number 1000000000"),
    "older file cut": (older(lambda raw: raw[: len(raw) // 2]), "damaged or not trusted"),
    "older file cut in its pickles": (older(lambda raw: raw[:200]), "damaged or not trusted"),
    "older file with a storage of 4 TB": (older(claiming), r"object has the number 1099511627776"),
    "older file with a table of 2^31 objects": (
        older(lambda raw: b"\x80\x02}r\xff\xff\xff\x7f." * 4), "has the number 2147483647"),
    "older file with a text of 2^60 bytes": (
        older(lambda _: pickle.dumps(1) * 3 + b"\x80\x04\x8d" + (2**60).to_bytes(8, "little")), "damaged"),
    "older file of nothing": (older(lambda _: b""), "damaged or not trusted"),
    "older file of noise": (older(lambda _: os.urandom(16) * 100), "damaged or not trusted"),
}  # fmt: skip
ALL: dict[str, Entry] = {**CONFIGS, **HEADERS, **OLDER}
