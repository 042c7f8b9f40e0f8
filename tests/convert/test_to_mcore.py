"""Older layouts of megatron-core's own models become what training reads, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.fingerprint import weights_hash
from nemo_dpo.checkpoint.weights import Chunk, check_metadata_pickle, read_weights
from nemo_dpo.convert import hf_to_nemo, nemo_to_hf, run
from nemo_dpo.convert.summary import summarise
from nemo_dpo.convert.to_mcore import nemo_to_mcore
from nemo_dpo.convert.verify import verify
from tests.convert.conftest import BASE, assert_same_tensors, save_model
from tests.support.layouts import write_local_names, write_local_zarr, write_ranks, write_zarr

SHAPE = {**BASE, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf/` and the `.nemo` made of it, extracted as `nemo/`: query groups, gated MLP."""
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("good")
    save_model(root / "hf", LlamaConfig(**SHAPE, eos_token_id=2), dtype=getattr(torch, request.param))
    hf_to_nemo(root / "hf", root / "good.nemo")
    archive.extract(root / "good.nemo", root / "nemo")
    return root


@pytest.fixture
def older(good: Path, tmp_path: Path) -> Path:
    """A copy of the extracted archive without its weights."""
    shutil.copytree(good / "nemo", tmp_path / "older", ignore=shutil.ignore_patterns("model_weights"))
    return tmp_path / "older"


def stored(good: Path) -> dict[str, Any]:
    return dict(read_weights(good / "nemo" / "model_weights"))


def check_converts(older: Path, good: Path) -> None:
    """To megatron-core's kind with the same bits, and to Hugging Face."""
    target = older.parent / "new"
    nemo_to_mcore(older, older.parent / "new.nemo")
    archive.extract(older.parent / "new.nemo", target)
    check_metadata_pickle(target / "model_weights")  # what training asks
    found, expected = read_weights(target / "model_weights"), stored(good)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    nemo_to_hf(older.parent / "new.nemo", older.parent / "back")
    assert_same_tensors(good / "hf", older.parent / "back")


@pytest.mark.parametrize("local_names", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (2, 4)])
def test_ranks_of_megatron_cores_own_model(good: Path, older: Path, tp: int, pp: int, local_names: bool) -> None:
    write_ranks(older, stored(good), tp, pp, local_names)
    check_converts(older, good)


def test_zarr(good: Path, older: Path) -> None:
    write_zarr(older / "model_weights", stored(good), ranks=2)
    check_converts(older, good)


@pytest.mark.parametrize("write", [write_local_names, write_local_zarr])
def test_a_distributed_checkpoint_with_the_names_of_local_layers(good: Path, older: Path, write: Any) -> None:
    write(older / "model_weights", stored(good))
    check_converts(older, good)


@pytest.mark.parametrize("write", [write_local_names, write_local_zarr, write_zarr])
def test_every_tool_reads_distributed_checkpoints_of_any_names(good: Path, older: Path, write: Any) -> None:
    """Without a conversion first: export, comparison, hash, and the model that training builds, by its logits."""
    write(older / "model_weights", stored(good))
    nemo_to_hf(older, older.parent / "direct")
    assert_same_tensors(good / "hf", older.parent / "direct")
    equal, lines = verify(good / "hf", older)
    assert equal and any(line.startswith("logits: largest") for line in lines), lines
    assert summarise(older)["hash"] == summarise(good / "nemo")["hash"] == weights_hash(older / "model_weights")


def test_a_parameter_under_both_names(good: Path, older: Path) -> None:
    norm = stored(good)["model.decoder.layers.self_attention.linear_qkv.layer_norm_weight"]
    write_zarr(older / "model_weights", {**stored(good), "model.decoder.layers.input_layernorm.weight": norm})
    with pytest.raises(CheckpointError, match="under two names"):
        nemo_to_hf(older, older.parent / "back")


def test_what_is_written_wrong_is_noticed(good: Path, older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ranks(older, stored(good), 2, 1)
    target, write = older.parent / "new.nemo", run.stream_weights

    def wrong(change: Any) -> None:
        monkeypatch.setattr(run, "stream_weights", lambda create, chunks: write(create, change(chunks)))
        with pytest.raises(CheckpointError) as caught:
            nemo_to_mcore(older, target)
        assert {entry.name for entry in older.parent.iterdir()} == {"older"}
        said.append(str(caught.value))

    said: list[str] = []
    wrong(lambda chunks: (Chunk(c.name, c.tensor + (c.layer == 2), c.layer, c.num_layers) for c in chunks))
    wrong(lambda chunks: itertools.chain(chunks, [Chunk("model.more", torch.ones(2))]))
    wrong(lambda chunks: (c for c in chunks if c.name != "model.decoder.final_layernorm.weight"))
    assert "layers." in said[0] and "was read back different from" in said[0]
    assert "model.more, which was not to be written" in said[1]
    assert "lacks model.decoder.final_layernorm.weight" in said[2]
    monkeypatch.setattr(run, "stream_weights", lambda create, chunks: write(create, list(chunks)[1:]))
    nemo_to_mcore(older, target, verify=False)


def test_the_new_weights_lie_on_the_disk_once(good: Path, older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ranks(older, stored(good), 2, 1)
    write, most = run.stream_weights, 0

    def watched(create: Any, chunks: Iterator[Chunk]) -> None:
        nonlocal most
        write(create, chunks)
        new = [file for file in older.parent.rglob("*") if file.is_file() and older not in file.parents]
        most = sum(file.stat().st_size for file in new)

    monkeypatch.setattr(run, "stream_weights", watched)
    nemo_to_mcore(older, older.parent / "new.nemo")
    tokenizer = sum(file.stat().st_size for file in older.glob("*_tokenizer/*"))
    assert 0 < most < (older.parent / "new.nemo").stat().st_size + tokenizer + 20_000  # model_config.yaml, ends of tar


@contextlib.contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """The largest size in bytes of this process's own memory, without mapped files, beyond what it has now."""

    def size() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    start, peak, done = size(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], size() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_memory_is_that_of_one_tensor(tmp_path: Path, tp: int) -> None:
    """512 MB of weights in tensors of up to 32 MB."""
    layers, hidden, ffn = 8, 1024, 4096
    shapes = {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "decoder.layers.self_attention.linear_qkv.weight": (3 * hidden, hidden),
        "decoder.layers.self_attention.linear_proj.weight": (hidden, hidden),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (hidden,),
        "decoder.layers.mlp.linear_fc1.weight": (2 * ffn, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (hidden, ffn),
    }
    stacked = {f"model.{name}": torch.zeros(1).expand(layers, *shape) for name, shape in shapes.items()}
    outer = {"model.embedding.word_embeddings.weight": torch.zeros(256, hidden)}
    outer |= {"model.decoder.final_layernorm.weight": torch.ones(hidden)}
    sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": 16}
    config = {**sizes, "mcore_gpt": True, "vocab_size": 256, "max_position_embeddings": 64, "bias": False}
    config |= {"activation": "fast-swiglu", "normalization": "rmsnorm", "position_embedding_type": "rope"}
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "model_config.yaml").write_text(yaml.safe_dump(config))
    write_ranks(tmp_path / "older", {**outer, **stacked}, tp, 1)
    gc.collect()
    with anonymous_memory() as peak:
        nemo_to_mcore(tmp_path / "older", tmp_path / "new.nemo")
    assert (tmp_path / "new.nemo").stat().st_size > 500e6
    # The joined tensor, the copy that is saved, and what the allocator and the file buffers keep.
    assert peak[0] < 4 * 32e6


def test_an_adapter_is_no_older_model(good: Path, older: Path) -> None:
    torch.save({}, older / "model_weights.ckpt")
    config = yaml.safe_load((older / "model_config.yaml").read_text())
    (older / "model_config.yaml").write_text(yaml.safe_dump({**config, "peft": {"peft_scheme": "lora"}}))
    with pytest.raises(CheckpointError, match="holds an adapter"):
        nemo_to_mcore(older, older.parent / "new.nemo")


def test_older_layouts_of_experts_are_refused(older: Path) -> None:
    """Their norm has a name that is respelled where there is an MLP."""
    torch.save({}, older / "model_weights.ckpt")
    config = yaml.safe_load((older / "model_config.yaml").read_text())
    (older / "model_config.yaml").write_text(yaml.safe_dump({**config, "num_moe_experts": 4}))
    with pytest.raises(CheckpointError, match=r"holds a model with experts \(num_moe_experts=4\); of those only"):
        nemo_to_mcore(older, older.parent / "new.nemo")
    assert not (older.parent / "new.nemo").exists()
