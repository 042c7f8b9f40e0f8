"""What a finished run leaves: test metrics, the trained `.nemo`, a Hugging Face or PEFT folder, a plot."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_dpo.checkpoint import archive, sharded
from nemo_dpo.checkpoint.folders import unfinished
from nemo_dpo.config import Config
from nemo_dpo.convert import nemo_to_hf
from nemo_dpo.convert.adapter_peft import Names, check_exportable, nemo_to_peft
from nemo_dpo.convert.families import family_of_nemo
from nemo_dpo.lora.spec import LoraSpec
from nemo_dpo.parallel.collective import on_rank_zero
from nemo_dpo.parallel.engine import Engine
from nemo_dpo.training import run_log
from nemo_dpo.training.data import PairData
from nemo_dpo.training.module import PreferenceModule
from nemo_dpo.training.plot import plot_metrics

logger = logging.getLogger(__name__)


def finish(
    cfg: Config, log_dir: Path, module: PreferenceModule, data: PairData, export: Callable[[Path], Path]
) -> None:
    """Run once, after the last step. Collective.

    Args:
        export: writes what was trained as a `.nemo`.

    Raises:
        Stopped: asked to, before the export.
    """
    test = data.batches("test")
    if test is not None:
        metrics = module.evaluate(test, [])
        for target in module.trainer.loggers:
            target.log_metrics({f"test/{name}": value for name, value in metrics.items()}, data.max_steps)
        logger.info("test loss %.4f, acc %.3f", metrics["loss"], metrics["acc"])
    if cfg.exp_manager.checkpoint_callback_params.save_nemo_on_train_end:
        path = export(nemo_path(cfg, log_dir))
        if cfg.exp_manager.hf_export_on_train_end:
            on_rank_zero(lambda: _export_hf(path, is_adapter=cfg.model.peft.lora))
    if cfg.exp_manager.plot_on_train_end:
        on_rank_zero(lambda: plot_metrics(log_dir / run_log.METRICS_FILE, log_dir / "metrics.png"))


def check_export(cfg: Config, model_config: dict[str, Any], adapter: LoraSpec | None = None) -> None:
    """Refuse at the start a Hugging Face folder that could not be written at the end.

    Args:
        model_config: of the base.
        adapter: the one that is trained, once it is known.

    Raises:
        CheckpointError: no family of Hugging Face's computes what the base does, or PEFT has no place for the adapter.
    """
    if not cfg.exp_manager.hf_export_on_train_end:
        return
    if adapter:
        check_exportable(adapter, Names(model_config))
    else:
        family_of_nemo(model_config)


def nemo_path(cfg: Config, log_dir: Path) -> Path:
    """Where the trained model is written."""
    return log_dir / "checkpoints" / f"{cfg.exp_manager.name}.nemo"


def export_nemo(path: Path, base: Path, engine: Engine) -> Path:
    """Write the policy as a `.nemo` archive with the config and the tokenizer of `base`. Collective."""
    folder = unfinished(path)
    on_rank_zero(lambda: _copy_all_but_weights(base, folder))
    sharded.save_weights(folder / archive.MODEL_WEIGHTS, engine)
    on_rank_zero(lambda: archive.write_archive(folder, path, overwrite=True))
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    logger.info("trained model: %s", path)
    return path


def _copy_all_but_weights(base: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(archive.MODEL_WEIGHTS))


def _export_hf(nemo: Path, *, is_adapter: bool) -> None:
    """Write what `nemo` holds beside it: a model as a Hugging Face folder, an adapter as one of PEFT."""
    folder = nemo.with_name(nemo.stem + ("_peft" if is_adapter else "_hf"))
    write = nemo_to_peft if is_adapter else nemo_to_hf
    write(nemo, folder, overwrite=True)
    logger.info("Hugging Face folder: %s", folder)
