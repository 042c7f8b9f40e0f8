"""`.nemo` archives: round trips, and archives that are broken or hostile."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nemo_dpo.checkpoint import CheckpointError, archive
from tests.support.disk import full_disk

CONFIG = {"num_layers": 2, "layernorm_epsilon": 1e-5, "name": "тест"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An extracted .nemo with one artefact and two files of weights."""
    root = tmp_path / "content"
    (root / "model_weights").mkdir(parents=True)
    (root / "model_weights" / "__0_0.distcp").write_bytes(os.urandom(100_000))
    (root / "model_weights" / ".metadata").write_bytes(b"index")
    (root / ("0" * 32 + "_tokenizer")).mkdir()
    (root / ("0" * 32 + "_tokenizer") / "tokenizer.json").write_text("{}")
    archive.write_model_config(CONFIG, root)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip_with_nemos_names(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    archive.write_archive(folder, path)
    with tarfile.open(path, "r:") as tar:  # plain: no decompression
        names = tar.getnames()
        assert {(m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, "", "")}
    assert names[0] == "./model_config.yaml" and all(name.startswith("./") for name in names)
    archive.extract(path, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert archive.read_model_config(path) == archive.read_model_config(folder) == CONFIG


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_plain_and_gzipped_archives_are_read(folder: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "model.nemo"
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]  # as NeMo writes it: the folder itself first
        tar.add(folder, arcname=".")
    assert archive.read_model_config(path) == CONFIG
    with archive.open_folder(path, tmp_path) as extracted:
        assert contents(extracted) == contents(folder)
    assert not extracted.exists()


def test_an_extracted_folder_is_used_in_place(folder: Path) -> None:
    with archive.open_folder(folder) as opened:
        assert opened == folder
    assert folder.exists()


def test_reading_the_config_of_a_large_archive_takes_no_time_and_no_torch(folder: Path, tmp_path: Path) -> None:
    with (folder / "model_weights" / "big").open("wb") as file:
        file.truncate(300_000_000)
    path = tmp_path / "model.nemo"
    archive.write_archive(folder, path)
    start = time.process_time()
    archive.read_model_config(path)
    assert time.process_time() - start < 0.1
    code = "import sys; from pathlib import Path; from nemo_dpo.checkpoint import archive; "
    code += (
        f"archive.read_model_config(Path({str(path)!r})); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interpolations_of_nemos_templates_are_resolved(folder: Path) -> None:
    text = "encoder_seq_length: 64\nlr: 1e-5\nmax: ${.encoder_seq_length}\n"
    text += "data: {seq_length: '${model.encoder_seq_length}'}\n"
    (folder / "model_config.yaml").write_text(text)
    expected = {"encoder_seq_length": 64, "lr": 1e-5, "max": 64, "data": {"seq_length": 64}}
    assert archive.read_model_config(folder) == expected
    (folder / "model_config.yaml").write_text("max: ${.nothing}")
    with pytest.raises(CheckpointError, match="nothing"):
        archive.read_model_config(folder)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncation_is_noticed_wherever_it_falls(folder: Path, tmp_path: Path, mode: str) -> None:
    path, cut = tmp_path / "model.nemo", tmp_path / "cut.nemo"
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=".")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        boundaries = [member.offset for member in tar] if mode == "w" else []
    for number, size in enumerate([0, 1, 300, 600, len(whole) // 2, len(whole) - 20_000, *boundaries]):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            archive.extract(cut, tmp_path / f"target{number}")
        assert "\n" not in str(caught.value)


INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_config": (lambda f: (f / "model_config.yaml").unlink(), "holds no model_config.yaml"),
    "no_weights": (lambda f: (f / "model_weights").rename(f / "weights"), "holds no model_weights"),
    "legacy_file": (
        lambda f: (f / "model_weights").rename(f / "model_weights.ckpt"),
        r"older layout \(model_weights\.ckpt\); convert it with tools/convert/convert_gpt",
    ),
    "legacy_ranks": (lambda f: (f / "model_weights").rename(f / "tp_rank_00_pp_rank_000"), "older layout"),
}


@pytest.mark.parametrize(("damage", "match"), INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_missing_parts_are_named(folder: Path, tmp_path: Path, damage: Callable[[Path], object], match: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=match), archive.open_folder(folder):
        pass
    with tarfile.open(tmp_path / "model.nemo", "w") as tar:
        tar.add(folder, arcname=".")
    with pytest.raises(CheckpointError, match=match), archive.open_folder(tmp_path / "model.nemo", tmp_path):
        pass


def test_paths_that_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "text.nemo").write_text("not a tar " * 200)
    for path, match in ((tmp_path / "none.nemo", "no such"), (tmp_path / "text.nemo", "not a .nemo archive")):
        with pytest.raises(CheckpointError, match=match):
            archive.read_model_config(path)
        with pytest.raises(CheckpointError, match=match), archive.open_folder(path):
            pass


def test_a_full_disk_leaves_the_earlier_archive_and_no_rubbish(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(b"the earlier one")
    with full_disk(50_000), pytest.raises(CheckpointError, match="cannot be written"):
        archive.write_archive(folder, path, overwrite=True)
    assert path.read_bytes() == b"the earlier one"
    assert {entry.name for entry in tmp_path.iterdir()} == {"content", "model.nemo"}


def test_nothing_is_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="exists already"):
        archive.write_archive(folder, path)
    assert path.read_bytes() == b"precious"
    archive.write_archive(folder, path, overwrite=True)
    assert archive.read_model_config(path) == CONFIG


def test_the_config_is_plain_yaml_and_artefacts_have_nemos_names(folder: Path) -> None:
    assert yaml.safe_load((folder / "model_config.yaml").read_text()) == CONFIG
    name = archive.artefact_name("tokenizer.model")
    assert name[32:] == "_tokenizer.model" and int(name[:32], 16) >= 0
    assert archive.artefact_name("x") != archive.artefact_name("x")
