"""Broken and hostile Hugging Face folders: nothing runs, memory stays small, one line says why, nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_dpo.convert import hf_to_nemo
from tests.convert import hostile, hostile_folders
from tests.convert.conftest import BASE, save_model
from tests.convert.test_hostile_archives import REFUSALS, limited_memory


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("good") / "hf"
    save_model(folder, LlamaConfig(**BASE, eos_token_id=2))
    hf_to_nemo(folder, folder.parent / "good.nemo")
    return folder


@pytest.mark.parametrize(("damage", "match"), hostile_folders.ALL.values(), ids=hostile_folders.ALL.keys())
def test_refused_in_one_line_and_without_harm(
    good: Path, tmp_path: Path, damage: hostile_folders.Damage, match: str
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(good, source)
    damage(source)
    with limited_memory(), pytest.raises(REFUSALS, match=match) as caught:
        hf_to_nemo(source, tmp_path / "x.nemo")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf"}  # nor what the traps leave behind
    assert not (tmp_path / hostile.MARK).exists()


def test_a_file_older_than_torch_1_6_is_read(good: Path, tmp_path: Path) -> None:
    """The same damage as in the cases of such files, but none."""
    shutil.copytree(good, tmp_path / "hf")
    hostile_folders.older()(tmp_path / "hf")
    with limited_memory():
        hf_to_nemo(tmp_path / "hf", tmp_path / "x.nemo")
