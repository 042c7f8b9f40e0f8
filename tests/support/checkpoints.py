"""What lies in the folder of a run's checkpoints."""

from __future__ import annotations

from pathlib import Path

from nemo_dpo.checkpoint import manifest
from nemo_dpo.checkpoint.fingerprint import tensors_hash
from nemo_dpo.checkpoint.folders import complete_checkpoints, read_progress
from nemo_dpo.checkpoint.weights import read_weights


def whole_checkpoints(log_dir: Path) -> dict[int, Path]:
    """Those under a final name by their steps, in the order of their saves; a damaged one fails the test."""
    folders = complete_checkpoints(log_dir / "checkpoints")
    for folder in folders:
        manifest.check(folder, manifest.read(folder))
    return {read_progress(folder)["step"]: folder for folder in folders}


def state_hash(folder: Path) -> str:
    """Of all tensors of a checkpoint: the weights and the optimizer's state."""
    tensors = dict(read_weights(folder))
    assert any(name.startswith("optimizer.") for name in tensors), sorted(tensors)
    return tensors_hash(tensors)
