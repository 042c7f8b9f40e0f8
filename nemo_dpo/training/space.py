"""Room on the disk for checkpoints: said before it is missed."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.checkpoint.folders import free_bytes
from nemo_dpo.checkpoint.writing import MIB
from nemo_dpo.config.schema import OptimConfig
from nemo_dpo.parallel.collective import gather
from nemo_dpo.parallel.engine import Engine, is_distributed
from nemo_dpo.parallel.experts import is_expert

logger = logging.getLogger(__name__)

FP32 = 4  # bytes of a master weight, a moment, a momentum


def expected_bytes(engine: Engine, optim: OptimConfig) -> int:
    """Tensors of a checkpoint before there is one: weights, fp32 masters where there are any, the optimizer's moments.

    Collective. A little too much where tensor-parallel ranks hold copies (norms).
    """
    distributed = is_distributed(optim)  # stores masters of fp32 weights, too
    states = 2 if optim.name != "sgd" else int(optim.momentum > 0)
    own = sum(
        p.numel() * (p.itemsize + FP32 * (states + int(distributed or p.itemsize < FP32))) * _shares(p, engine)
        for p in engine.trainable
    )
    return sum(gather(own)) // engine.groups.layout.dp


def _shares(parameter: nn.Parameter, engine: Engine) -> int:
    """Data-parallel ranks with other parameters in this one's place: those that share the experts."""
    return engine.groups.layout.ep if is_expert(parameter) else 1


def check_room(folder: Path, needed: int) -> None:
    """Refuse a run whose first checkpoint has no room.

    Args:
        folder: of the checkpoints; it need not exist.
        needed: bytes of one.

    Raises:
        CheckpointError: naming both sizes.
    """
    if (free := free_bytes(folder)) < needed:
        raise CheckpointError(
            f"a checkpoint of this run takes about {needed / MIB:.1f} MiB and {free / MIB:.1f} MiB are free for "
            f"{folder}; make space, set exp_manager.explicit_log_dir to a larger disk, "
            "or exp_manager.create_checkpoint_callback=false"
        )


def warn_if_short(folder: Path, needed: int) -> None:
    """Say so, in time to make space, where the next checkpoint of `needed` bytes has no room."""
    if (free := free_bytes(folder)) < needed:
        logger.warning(
            "the next save will fail: it takes about %.1f MiB and %.1f MiB are free for %s; make %.1f MiB of space",
            needed / MIB,
            free / MIB,
            folder,
            (needed - free) / MIB,
        )
