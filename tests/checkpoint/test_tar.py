"""Archives written file by file, without a copy beside them, and read where they are."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path, PurePosixPath

import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.tar import Span, TarPath, TarWriter
from nemo_dpo.checkpoint.weights import Chunk, read_weights, stream_weights

TENSOR = torch.arange(24.0).reshape(4, 6)
CONFIG = {"num_layers": 4}


def write(path: Path, scratch: Path) -> Path:
    """A .nemo whose weights go straight into the archive."""
    scratch.mkdir()
    archive.write_model_config(CONFIG, scratch)
    (scratch / "0_tokenizer").mkdir()
    (scratch / "0_tokenizer" / "tokenizer.json").write_text("{}")
    with archive.new_archive(path) as tar:
        tar.add_tree(scratch, first=archive.MODEL_CONFIG)
        stream_weights(
            lambda name: tar.create(f"model_weights/{name}"), (Chunk("t", TENSOR[n], n, 4) for n in range(4))
        )
    return path


def test_the_weights_are_the_same_unpacked_and_in_place(tmp_path: Path) -> None:
    path = write(tmp_path / "model.nemo", tmp_path / "small")
    archive.extract(path, tmp_path / "unpacked")
    assert torch.equal(read_weights(tmp_path / "unpacked" / "model_weights")["t"], TENSOR)
    with archive.open_parts(path, tmp_path) as (folder, stored):
        weights = read_weights(stored)
        assert torch.equal(weights["t"], TENSOR) and torch.equal(weights.layer("t", 2), TENSOR[2])
        assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == [
            "0_tokenizer", "0_tokenizer/tokenizer.json", "model_config.yaml",
        ]  # fmt: skip
    assert not folder.exists()
    with tarfile.open(path, "r:") as tar:
        assert tar.getnames()[0] == "./model_config.yaml" and all(name.startswith("./") for name in tar.getnames())
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


def test_a_file_over_eight_gigabytes_fits_into_its_header(tmp_path: Path) -> None:
    """Eleven octal digits end at 8 GiB; the length must not need a second header, whose place is no longer free."""
    size = 9 * 2**30
    with (tmp_path / "x.tar").open("wb") as file:
        tar = TarWriter(file)
        with tar.create("big") as member:
            file.seek(size - 1, io.SEEK_CUR)  # a hole, which takes no room on the disk
            member.write(b"x")
        with tar.create("next") as member:
            member.write(b"after")
        tar.close()
    with tarfile.open(tmp_path / "x.tar") as read:
        assert [(member.name, member.size) for member in read] == [("./big", size), ("./next", 5)]
        following = read.extractfile("./next")
        assert following is not None and following.read() == b"after"


def test_nothing_appears_if_the_check_of_what_was_written_fails(tmp_path: Path) -> None:
    def check(written: Path) -> None:
        assert archive.read_model_config(written) == CONFIG  # complete, under another name
        raise CheckpointError("no")

    (tmp_path / "small").mkdir()
    archive.write_model_config(CONFIG, tmp_path / "small")
    with pytest.raises(CheckpointError, match="no"), archive.new_archive(tmp_path / "x.nemo", check=check) as tar:
        tar.add_tree(tmp_path / "small")
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


def test_compressed_archives_and_folders_open_as_well(tmp_path: Path) -> None:
    path = write(tmp_path / "model.nemo", tmp_path / "small")
    archive.extract(path, tmp_path / "unpacked")
    with tarfile.open(tmp_path / "packed.nemo", "w:gz") as tar:
        tar.add(tmp_path / "unpacked", arcname=".")
    for source in (tmp_path / "packed.nemo", tmp_path / "unpacked"):
        with archive.open_parts(source, tmp_path) as (folder, stored):
            assert torch.equal(read_weights(stored)["t"], TENSOR) and (folder / "model_config.yaml").is_file()


@pytest.mark.parametrize("damage", ["cut", "end"])
def test_a_truncated_archive_is_refused_before_anything_is_read(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "model.nemo", tmp_path / "small")
    with tarfile.open(path) as tar:
        last = max(tar, key=lambda member: member.offset_data)
    path.write_bytes(path.read_bytes()[: last.offset_data + (1 if damage == "cut" else tarfile.BLOCKSIZE)])
    with pytest.raises(CheckpointError, match="truncated"), archive.open_parts(path, tmp_path):
        pass


def test_names_that_lead_out_are_refused_in_place_too(tmp_path: Path) -> None:
    path = write(tmp_path / "model.nemo", tmp_path / "small")
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("../out"))
    with pytest.raises(CheckpointError, match="not trusted"), archive.open_parts(path, tmp_path):
        pass


def test_an_index_inside_an_archive_is_no_more_trusted_than_one_outside(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    archive.write_model_config(CONFIG, tmp_path / "small")
    with archive.new_archive(tmp_path / "x.nemo") as tar:
        tar.add_tree(tmp_path / "small")
        for name, data in {
            ".metadata": pickle.dumps(print),
            "metadata.json": b'{"sharded_backend": "torch_dist"}',
        }.items():
            with tar.create(f"model_weights/{name}") as member:
                member.write(data)
    with (
        archive.open_parts(tmp_path / "x.nemo", tmp_path) as (_, stored),
        pytest.raises(CheckpointError, match=r"builtins\.print"),
    ):
        read_weights(stored)


def test_paths_inside_an_archive(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        tar = TarWriter(file)
        with tar.create("a/b.json") as member:
            member.write(json.dumps({"é": 1}, ensure_ascii=False).encode())
        tar.close()
    with tarfile.open(tmp_path / "x.tar") as read:
        spans = {PurePosixPath(m.name): Span(m.offset_data, m.size) for m in read}
    root = TarPath(tmp_path / "x.tar", spans, PurePosixPath())
    file_path = root / "a" / "b.json"
    assert file_path.is_file() and not file_path.is_dir() and (root / "a").is_dir() and not (root / "a").is_file()
    assert [path.name for path in root.iterdir()] == ["a"] and [p.name for p in (root / "a").iterdir()] == ["b.json"]
    assert json.loads(file_path.read_text(encoding="utf-8")) == {"é": 1} == json.loads(file_path.read_bytes())
    with file_path.open("rb") as file:
        assert file.seek(0, io.SEEK_END) == 9 and file.read() == b"" and file.seek(-2, io.SEEK_CUR) == 7
        assert file.read(100) == b"1}" and file.tell() == 9
    with pytest.raises(FileNotFoundError, match=r"x\.tar:none"):
        (root / "none").open("rb")
