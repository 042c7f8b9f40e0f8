"""Going on with a run: from which checkpoint, what must be as it was, and what follows each start's configuration."""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_dpo.checkpoint import CheckpointError, sharded
from nemo_dpo.checkpoint.folders import complete_checkpoints, read_progress, remove_unfinished
from nemo_dpo.checkpoint.writing import MIB
from nemo_dpo.config import Config
from nemo_dpo.config.exp_manager import ExpManagerConfig
from nemo_dpo.parallel.collective import on_rank_zero

logger = logging.getLogger(__name__)

# Keys of model.dpo that leave the loss as it is; `reference` is recorded by what it amounts to.
NOT_THE_OBJECTIVE = ("reference", "log_prob_forward_micro_batch_size")


def checkpoint_to_resume(manager: ExpManagerConfig, folder: Path) -> Path | None:
    """The checkpoint that this start goes on from: the one given, else the one saved last in `folder`; None: afresh.

    One that is not what was written is passed over, unless it was given. Collective.

    Raises:
        CheckpointError: the one given is none, or damaged, or all in `folder` are; a fresh start would write among the
            checkpoints of an earlier run; or there is none and a fresh start is not wanted.
    """
    manager = on_rank_zero(lambda: _wishes_of_this_start(manager, folder))
    found = on_rank_zero(lambda: _candidates(manager, folder))
    for checkpoint in reversed(found):
        try:
            size = sharded.check(checkpoint)
        except CheckpointError as error:
            if manager.resume_from_checkpoint is not None:
                raise CheckpointError(
                    f"exp_manager.resume_from_checkpoint: {error}; give another checkpoint"
                ) from error
            logger.warning("DAMAGED CHECKPOINT PASSED OVER: %s. Remove %s", error, checkpoint)
            continue
        logger.info("resuming from %s, %.1f MiB", checkpoint, size / MIB)
        return checkpoint
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {folder} are damaged (see above); restore one from a copy, or move them "
            "away to start afresh"
        )
    return None


@dataclass(frozen=True)
class Place:
    """Where a run begins.

    Attributes:
        step: updates made so far.
        validation_due: whether the weights at that step are to be validated first.
    """

    step: int = 0
    validation_due: bool = True


def this_job() -> dict[str, str]:
    """What a checkpoint records of the Slurm job that writes it."""
    return {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}


def _wishes_of_this_start(manager: ExpManagerConfig, folder: Path) -> ExpManagerConfig:
    """A requeued job repeats its arguments: what they say of its beginning is done once it has saved."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
        return manager
    jobs = [_job_of(checkpoint) for checkpoint in complete_checkpoints(folder)]
    if this_job().get("slurm_job") not in jobs:
        return manager
    return replace(manager, resume_from_checkpoint=None, resume_if_exists=True)


def _job_of(checkpoint: Path) -> str:
    try:
        return str(read_progress(checkpoint).get("slurm_job", ""))
    except CheckpointError:  # a damaged one, which is passed over later
        return ""


def _candidates(manager: ExpManagerConfig, folder: Path) -> list[Path]:
    """What may be resumed from, the one to try first last; removes what interrupted writers left."""
    for left in remove_unfinished(folder):
        logger.warning("removed %s, left by an interrupted save", left)
    for suffix in (".nemo", "_hf", "_peft"):
        # Names of archive.write_archive and of convert.run.temporary_folder.
        for left in folder.glob(f".{glob.escape(manager.name)}{suffix}.*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if manager.resume_from_checkpoint is not None:
        given = Path(manager.resume_from_checkpoint).absolute()
        read_progress(given)
        return [given]
    found = complete_checkpoints(folder)
    _check_wish(manager, folder, bool(found))
    return found


def _check_wish(manager: ExpManagerConfig, folder: Path, found: bool) -> None:
    if found and not manager.resume_if_exists:
        raise CheckpointError(
            f"{folder} holds checkpoints and exp_manager.resume_if_exists=false asks for a new run, which would mix "
            "with them; choose another exp_manager.explicit_log_dir, move that folder away, or set it to true to go on"
        )
    if not found and manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
        raise CheckpointError(
            f"{folder} holds no checkpoint and exp_manager.resume_ignore_no_checkpoint=false; "
            "set it to true to start afresh"
        )


def fixed_facts(cfg: Config, weights: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is about: its data and their order, the weights it starts from, its reference and its objective.

    Args:
        weights: hash of the weights of pretrained_checkpoint.restore_from_path.
        more: of the data, and of the adapters.
    """
    objective = {key: value for key, value in asdict(cfg.model.dpo).items() if key not in NOT_THE_OBJECTIVE}
    return {
        **more,
        "starting_weights": weights,
        "model.peft.peft_scheme": cfg.model.peft.peft_scheme,
        "the base's quantization": quantization(cfg),
        # Cached log-probs are the same, made at another time.
        "reference": cfg.model.reference_kind.removeprefix("cached:"),
        "model.optim.name": cfg.model.optim.name,
        **{f"model.dpo.{key}": value for key, value in objective.items()},
    }


def quantization(cfg: Config) -> str:
    """The base's, by what its values depend on: ranks pack their shares of a weight by themselves."""
    kind = cfg.model.peft.base_quantization
    return f"{kind} at tensor parallel size {cfg.model.tensor_model_parallel_size}" if kind else "none"


def steering(cfg: Config, max_steps: int) -> dict[str, Any]:
    """What steers the updates: with the step they say what optimizer and schedule do, whatever was before."""
    optim = {key: value for key, value in asdict(cfg.model.optim).items() if key not in ("name", "sched")}
    return {
        "max_steps": max_steps,
        **{f"model.optim.{key}": value for key, value in optim.items()},
        **{f"model.optim.sched.{key}": value for key, value in asdict(cfg.model.optim.sched).items()},
    }


def check_fixed(progress: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on as another run than the one that wrote the checkpoint.

    Raises:
        CheckpointError: naming the first of `fixed_facts` that changed.
    """
    was = progress.get("fixed", {})
    for key, value in now.items():
        if was.get(key, value) != value:
            raise CheckpointError(
                f"cannot resume: {key} was {was[key]} when the checkpoint was written and is {value}; "
                "restore it, or start in another exp_manager.explicit_log_dir"
            )


def announce_steering(progress: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """One line for each of `steering` that this start changes."""
    was = progress.get("steering", {})
    for key, value in now.items():
        if was.get(key, value) != value:
            logger.info("%s was %s and is %s from step %d on", key, was[key], value, progress["step"])
