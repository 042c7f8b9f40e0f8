"""What the command-line tests share: one tiny model, its preference pairs, and the arguments of a short run on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_dpo.convert import hf_to_nemo
from tests.support.tiny import write_hf_model, write_pairs

# Batches of 8, 8, 8 and 3: in the last one a micro-batch of 2 is half full.
TRAIN_PAIRS, VALIDATION_PAIRS, GLOBAL_BATCH = 27, 7, 8


@dataclass(frozen=True)
class Inputs:
    """Files that a run starts from."""

    nemo: Path
    train: Path
    validation: Path

    def arguments(self, precision: str = "32") -> list[str]:
        """A run of 8 steps: two epochs of four; saves nothing, validates before the first step and at the end."""
        return [
            f"pretrained_checkpoint.restore_from_path={self.nemo}",
            f"model.data.data_prefix={{train: [{self.train}], validation: [{self.validation}]}}",
            f"model.data.cache_dir={self.nemo.parent / 'cache'}",
            f"model.global_batch_size={GLOBAL_BATCH}",
            "model.micro_batch_size=2",
            f"trainer.precision={precision}",
            "trainer.accelerator=cpu",
            "trainer.dpo.max_epochs=2",
            "trainer.dpo.val_check_interval=8",
            "exp_manager.create_checkpoint_callback=false",
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false",
            "exp_manager.plot_on_train_end=false",
        ]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A random Llama of four layers in fp32 as a `.nemo`, 27 pairs to train on and 7 to validate on."""
    folder = tmp_path_factory.mktemp("inputs")
    nemo = folder / "tiny.nemo"
    hf_to_nemo(write_hf_model(folder / "hf"), nemo, precision="32")
    return Inputs(
        nemo,
        write_pairs(folder / "train.jsonl", TRAIN_PAIRS),
        write_pairs(folder / "validation.jsonl", VALIDATION_PAIRS, seed=1),
    )
