"""Names and rights of files: spaces and letters of any script in every path, and the umask in all that is written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nemo_dpo.convert import hf_to_nemo
from tests.cli.launch_support import QUICK, data
from tests.support.cli import run_cli
from tests.support.tiny import write_hf_model, write_pairs

SAVES = (
    "exp_manager.hf_export_on_train_end=true",
    "exp_manager.plot_on_train_end=true",
    "trainer.dpo.max_epochs=3",
    "trainer.dpo.max_steps=2",
)


def test_spaces_and_letters_of_any_script(tmp_path: Path) -> None:
    """Archive, data, caches, results and the experiment's name; quoted for hydra as the documents say."""
    folder = tmp_path / "Läufe, alle (数据) = α"
    folder.mkdir()
    nemo, train, valid = folder / "mein modell.nemo", folder / "train å.jsonl", folder / "valid ß.jsonl"
    hf_to_nemo(write_hf_model(folder / "h f"), nemo, precision="32")
    write_pairs(train, 8)
    write_pairs(valid, 4, seed=1)
    results = folder / "results ж"
    arguments = [
        f"pretrained_checkpoint.restore_from_path='{nemo}'",
        data(train, valid),
        f"exp_manager.explicit_log_dir='{results}'",
        f"model.data.cache_dir='{folder / 'c a c h e'}'",
        "exp_manager.name='größe 1'",
        "model.dpo.reference.kind=cached",
        f"model.dpo.reference.cache_dir='{folder / 'logps é'}'",
        "exp_manager.create_tensorboard_logger=true",
        *QUICK[:-2],
        *SAVES,
        "trainer.devices=2",
    ]
    run_cli(arguments, tmp_path / "output")
    assert (results / "checkpoints" / "größe 1.nemo").is_file()
    assert (results / "checkpoints" / "größe 1_hf" / "model.safetensors").is_file()
    again = run_cli([*arguments, "trainer.dpo.max_steps=3"], tmp_path / "output")
    assert "resuming from" in again.output
    assert len((results / "metrics.jsonl").read_text().splitlines()) > 3


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_holds_for_all_that_is_written(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        nemo = tmp_path / "model.nemo"
        hf_to_nemo(write_hf_model(tmp_path / "hf"), nemo, precision="32")
        files = data(write_pairs(tmp_path / "train.jsonl", 8), write_pairs(tmp_path / "valid.jsonl", 4, seed=1))
        start = [f"pretrained_checkpoint.restore_from_path={nemo}", files, *QUICK, *SAVES]
        more = ["model.dpo.reference.kind=cached", "exp_manager.create_tensorboard_logger=true"]
        patches = [f"tests.cli.broken_host:umask_{mask:03o}"]  # of the process that runs: the server has another
        run_cli([*start, *more], tmp_path / "log", patches=patches)
    finally:
        os.umask(before)
    written = [nemo, *(path for path in (tmp_path / "log").rglob("*") if path.name != "output.txt")]
    own = [path for path in written if not path.is_symlink()]
    assert {"metrics.jsonl", "common.pt", "megatron_gpt.nemo", "model.safetensors"} <= {path.name for path in own}
    wrong = {
        str(path.relative_to(tmp_path)): oct(found)
        for path in own
        if (found := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert wrong == {}
