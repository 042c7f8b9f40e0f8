"""Broken and hostile archives: nothing is written elsewhere, nothing runs, memory stays small, one line says why."""

from __future__ import annotations

import contextlib
import io
import pickle
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError, archive, torch_file
from nemo_dpo.checkpoint.weights import check_metadata_pickle
from nemo_dpo.convert import hf_to_nemo, nemo_to_hf
from nemo_dpo.model.architecture import ArchitectureError
from nemo_dpo.tokenizer import TokenizerError
from tests.convert import hostile
from tests.convert.conftest import BASE, assert_same_tensors, save_model
from tests.support.layouts import write_one_file, write_zarr

REFUSALS = (CheckpointError, ArchitectureError, TokenizerError)  # what the commands print as one line
MEMORY = 2**30  # beyond what the process has mapped; the good archive needs a few MB


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf/` and the `.nemo` made of it, extracted as `nemo/`."""
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("good")
    save_model(root / "hf", LlamaConfig(**BASE, eos_token_id=2))
    hf_to_nemo(root / "hf", root / "good.nemo")
    archive.extract(root / "good.nemo", root / "nemo")
    (root / "good.nemo").unlink()
    return root


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """A request for more memory than MEMORY fails while this lasts."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(("make", "match"), hostile.ALL.values(), ids=hostile.ALL.keys())
def test_refused_in_one_line_and_without_harm(good: Path, tmp_path: Path, make: hostile.Make, match: str) -> None:
    shutil.copytree(good / "nemo", tmp_path / "spoiled")
    path = tmp_path / "bad.nemo"
    make(tmp_path / "spoiled", path)
    with limited_memory(), pytest.raises(REFUSALS, match=match) as caught:
        nemo_to_hf(path, tmp_path / "back")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert {entry.name for entry in tmp_path.iterdir()} == {"spoiled", "bad.nemo"}


@pytest.mark.parametrize("name", hostile.MEMBERS)
def test_unpacking_stays_in_its_folder(good: Path, tmp_path: Path, name: str) -> None:
    make, _ = hostile.MEMBERS[name]
    shutil.copytree(good / "nemo", tmp_path / "spoiled")
    make(tmp_path / "spoiled", tmp_path / "bad.nemo")
    target = tmp_path / "deep" / "target"
    with limited_memory(), pytest.raises(CheckpointError):
        archive.extract(tmp_path / "bad.nemo", target)
    assert {entry.name for entry in tmp_path.iterdir()} == {"spoiled", "bad.nemo", "deep"}
    assert list((tmp_path / "deep").iterdir()) == [target]
    assert all(entry.is_dir() or entry.is_file() for entry in target.rglob("*"))
    assert not any(entry.is_symlink() for entry in target.rglob("*"))


# Tensors themselves are read by torch, with weights_only.
@pytest.mark.parametrize("name", sorted(hostile.INDEX.keys() - {"a tensor that is code", "data of zeros"}))
def test_training_refuses_the_weights_before_megatron_core_sees_them(good: Path, tmp_path: Path, name: str) -> None:
    make, match = hostile.INDEX[name]
    shutil.copytree(good / "nemo", tmp_path / "spoiled")
    make(tmp_path / "spoiled", tmp_path / "bad.nemo")
    archive.extract(tmp_path / "bad.nemo", tmp_path / "target")
    with limited_memory(), pytest.raises(CheckpointError, match=match):
        check_metadata_pickle(tmp_path / "target" / "model_weights")
    assert not (tmp_path / hostile.MARK).exists()


def test_the_traps_work(tmp_path: Path) -> None:
    """Without the restraint of the readers, they would spring."""
    mark = tmp_path / hostile.MARK
    pickle.loads(pickle.dumps(hostile.Evil(mark)))
    assert mark.exists()
    mark.unlink()
    torch.save(hostile.Evil(mark), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert mark.exists()
    with pytest.raises(MemoryError), limited_memory():
        bytearray(2 * MEMORY)


def test_more_files_than_any_model_has(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.pack(good / "nemo", tmp_path / "many.nemo")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 5)
    with pytest.raises(CheckpointError, match="over 5 files and folders"):
        archive.extract(tmp_path / "many.nemo", tmp_path / "target")


def test_more_data_than_the_disk_has_room_for(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.pack(good / "nemo", tmp_path / "large.nemo")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="more data than free disk space"):
        archive.extract(tmp_path / "large.nemo", tmp_path / "target")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("layout", ["torch_dist", "one file", "zarr", "zarr of two ranks"])
def test_the_same_archives_unspoiled_are_read(good: Path, tmp_path: Path, layout: str, mode: str) -> None:
    """Also shows that older layouts of megatron-core's own names convert."""
    shutil.copytree(good / "nemo", tmp_path / "nemo")
    if layout == "one file":
        write_one_file(tmp_path / "nemo", hostile.taken_weights(tmp_path / "nemo"))
    elif layout != "torch_dist":
        tensors = hostile.taken_weights(tmp_path / "nemo")
        write_zarr(tmp_path / "nemo" / "model_weights", tensors, ranks=2 if "two" in layout else 1)
    hostile.pack(tmp_path / "nemo", tmp_path / "good.nemo", mode)
    with limited_memory():
        nemo_to_hf(tmp_path / "good.nemo", tmp_path / "back")
        nemo_to_hf(tmp_path / "nemo", tmp_path / "back_from_folder")
    assert_same_tensors(good / "hf", tmp_path / "back")
    assert_same_tensors(good / "hf", tmp_path / "back_from_folder")


def test_extra_states_of_transformer_engine_are_no_weights(tmp_path: Path) -> None:
    """They are None, or bytes in a file object."""
    stored = {"a": torch.ones(2), "x._extra_state": io.BytesIO(b"fp8"), "y._extra_state": None}
    torch.save(stored, tmp_path / "file")
    assert torch_file.load_tensors(tmp_path / "file", "file").keys() == {"a"}
