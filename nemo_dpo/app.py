"""The composition root: the one place that builds everything from a configuration."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from nemo.utils import logging as nemo_logging

from nemo_dpo.checkpoint import CheckpointError, archive, sharded
from nemo_dpo.config import Config, ConfigError
from nemo_dpo.losses import build_objective
from nemo_dpo.model.architecture import Architecture
from nemo_dpo.model.build import BuildOptions, build_model, has_transformer_engine
from nemo_dpo.model.gpt import ResponseGPT
from nemo_dpo.parallel import cpu_host
from nemo_dpo.parallel.collective import agree, on_rank_zero
from nemo_dpo.parallel.engine import Engine, weights_swapped
from nemo_dpo.parallel.groups import Groups, Layout, initialize
from nemo_dpo.reference.frozen import FrozenReference
from nemo_dpo.tokenizer import load_tokenizer
from nemo_dpo.training import run_log, signals
from nemo_dpo.training.cadence import Cadence, CheckpointKeeper, Rhythm
from nemo_dpo.training.data import PairData
from nemo_dpo.training.finish import export_nemo, finish, nemo_path
from nemo_dpo.training.module import PreferenceModule
from nemo_dpo.training.strategy import MegatronStrategy

logger = logging.getLogger(__name__)

REFERENCES = {"frozen": FrozenReference}


def train(cfg: Config) -> int:
    """A DPO run from its start, or from its newest checkpoint, to its end; returns the exit status."""
    log_dir = run_log.log_dir_of(cfg.exp_manager)
    with process_group(cfg) as groups:
        _quieten_libraries()
        on_rank_zero(lambda: run_log.check_wandb(cfg.exp_manager))
        resume = on_rank_zero(lambda: _checkpoint_to_resume(cfg, log_dir))
        on_rank_zero(lambda: run_log.save_run_facts(cfg, log_dir))
        with _extracted(Path(str(cfg.pretrained_checkpoint.restore_from_path))) as folder:
            model_config = archive.read_model_config(folder)
            tokenizer = load_tokenizer(model_config["tokenizer"], folder)
            data = PairData.prepare(cfg, model_config, tokenizer, log_dir, groups)
            engine = build_engine(cfg, model_config, folder, groups)
            module, trainer, cadence = _build_trainer(cfg, log_dir, folder, engine, data, resume)
            trainer.fit(
                module, data.train_loader(lambda: trainer.global_step), ckpt_path=str(resume) if resume else None
            )
            if trainer.global_step >= data.max_steps:
                finish(cfg, log_dir, folder, module, data)
            else:
                logger.warning(
                    "ended after step %d of %d (%s); start again to resume",
                    trainer.global_step,
                    data.max_steps,
                    cadence.stop_reason,
                )
    return 0


@contextmanager
def process_group(cfg: Config) -> Iterator[Groups]:
    """torch.distributed and megatron-core's groups over the ranks that the environment names."""
    on_cpu = cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    torch.use_deterministic_algorithms(cfg.model.deterministic)
    if on_cpu:
        cpu_host.install()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if on_cpu else "nccl", timeout=datetime.timedelta(minutes=30))
    try:
        yield initialize(layout_of(cfg, dist.get_world_size()), device, cfg.model.seed)
    finally:
        dist.destroy_process_group()


def layout_of(cfg: Config, world: int) -> Layout:
    """The parallel keys of `model`."""
    model = cfg.model
    chunks = model.virtual_pipeline_model_parallel_size or 1
    return Layout(
        world=world,
        tp=model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        vpp=chunks if chunks > 1 else None,
        sequence_parallel=model.sequence_parallel and model.tensor_model_parallel_size > 1,
    )


def build_engine(cfg: Config, model_config: Mapping[str, Any], folder: Path, groups: Groups) -> Engine:
    """The model of the extracted archive `folder` under this run's layout, with its optimizer."""
    chunks, transformer = build_model(Architecture.parse(model_config), groups, build_options(cfg, model_config))
    exact = _load_exact(folder / archive.MODEL_WEIGHTS, chunks)
    engine = Engine(chunks, transformer, groups, cfg.model.optim)
    engine.refine_masters(exact)
    logger.info(
        "model: %.1f M parameters on this rank; %s",
        sum(p.numel() for c in chunks for p in c.parameters()) / 1e6,
        groups.layout,
    )
    return engine


def _load_exact(weights: Path, chunks: list[ResponseGPT]) -> list[list[torch.Tensor]]:
    """Fill the chunks; returns the same weights in fp32, for a model in bf16 the unrounded ones."""
    exact = [[p.detach().to(torch.float32) for p in chunk.parameters()] for chunk in chunks]
    with weights_swapped(chunks, exact):
        sharded.load_weights(weights, chunks)
    with torch.no_grad():
        for chunk, tensors in zip(chunks, exact, strict=True):
            for parameter, tensor in zip(chunk.parameters(), tensors, strict=True):
                parameter.copy_(tensor)
    return exact


def build_options(cfg: Config, model_config: Mapping[str, Any]) -> BuildOptions:
    """What `model` says about precision, kernels, recompute and dropout; null is what the checkpoint says."""
    model = cfg.model
    wanted = model.transformer_engine
    if wanted and not has_transformer_engine():
        raise ConfigError(
            "model.transformer_engine=true but transformer_engine cannot be imported here; use null or false"
        )
    granularity, method, num_layers = recompute_options(cfg, model_config)
    return BuildOptions(
        dtype=torch.bfloat16 if cfg.trainer.bf16 else torch.float32,
        transformer_engine=has_transformer_engine() if wanted is None else wanted,
        recompute_granularity=granularity,
        recompute_method=method,
        recompute_num_layers=num_layers,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        deterministic=model.deterministic,
    )


def recompute_options(cfg: Config, model_config: Mapping[str, Any]) -> tuple[str | None, str | None, int | None]:
    """Granularity, method and number of layers of activation recompute; the last two belong to `full` alone."""
    model = cfg.model
    granularity = model.activations_checkpoint_granularity or model_config.get("activations_checkpoint_granularity")
    method = model.activations_checkpoint_method or model_config.get("activations_checkpoint_method")
    num_layers = model.activations_checkpoint_num_layers or model_config.get("activations_checkpoint_num_layers")
    if granularity == "full":
        return granularity, method, num_layers
    return (granularity if granularity == "selective" else None), None, None


def _build_trainer(
    cfg: Config, log_dir: Path, base: Path, engine: Engine, data: PairData, resume: Path | None
) -> tuple[PreferenceModule, pl.Trainer, Cadence]:
    progress = sharded.read_progress(resume) if resume else {"step": 0}
    data.check_unchanged(progress)
    module = PreferenceModule(
        engine,
        REFERENCES[cfg.model.dpo.reference.kind](engine),
        build_objective(cfg.model.dpo),
        cfg.model.optim,
        clip_grad=cfg.trainer.dpo.gradient_clip_val,
        max_steps=data.max_steps,
    )
    params = cfg.exp_manager.checkpoint_callback_params
    keeper = CheckpointKeeper(log_dir / "checkpoints", params) if cfg.exp_manager.create_checkpoint_callback else None
    rhythm = Rhythm(
        max_steps=data.max_steps,
        val_interval=data.validation_interval,
        save_interval=cfg.trainer.dpo.save_interval,
        log_interval=cfg.trainer.log_every_n_steps,
        sampler=data.sampler,
    )
    limit = signals.TimeLimit(cfg.exp_manager.max_time_per_run)
    export = partial(export_nemo, nemo_path(cfg, log_dir), base) if params.always_save_nemo else None
    cadence = Cadence(rhythm, data.batches("validation"), keeper, limit, after_save=export)
    module.progress = lambda: {**data.progress(module.trainer.global_step), "layout": sharded.layout_of(engine)}
    trainer = pl.Trainer(
        accelerator="cpu" if engine.groups.device.type == "cpu" else "gpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=engine.groups.layout.world // int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=MegatronStrategy(engine),
        plugins=[TorchElasticEnvironment()],
        precision="32-true",  # megatron-core holds the dtype; Lightning's would autocast around it
        max_epochs=-1,
        max_steps=data.max_steps,
        callbacks=[cadence, run_log.ProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    # Lightning turns SIGTERM into exit status 0 without a checkpoint; `signals` notes it and `Cadence` acts on it.
    trainer._signal_connector.register_signal_handlers = lambda: None
    run_log.attach_loggers(trainer, cfg.exp_manager, log_dir, progress["step"])
    return module, trainer, cadence


def _checkpoint_to_resume(cfg: Config, log_dir: Path) -> Path | None:
    manager = cfg.exp_manager
    if manager.resume_from_checkpoint is not None:
        folder = Path(manager.resume_from_checkpoint)
        sharded.read_progress(folder)
        return folder
    for left in sharded.remove_unfinished(log_dir / "checkpoints"):
        logger.warning("removed %s, left by an interrupted save", left)
    for half in (log_dir / "checkpoints").glob(".*.nemo.*.tmp"):  # archive.write_archive's name
        half.unlink()
    found = sharded.complete_checkpoints(log_dir / "checkpoints") if manager.resume_if_exists else []
    if not found and manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
        raise CheckpointError(
            f"{log_dir / 'checkpoints'} holds no checkpoint and exp_manager.resume_ignore_no_checkpoint=false; "
            "set it to true to start afresh"
        )
    if found:
        logger.info("resuming from %s", found[-1])
    return found[-1] if found else None


@contextmanager
def _extracted(path: Path) -> Iterator[Path]:
    """The archive as a folder that every rank of this host can read; it is unpacked once a host."""
    if path.is_dir():
        with archive.open_folder(path) as folder:
            yield folder
        return
    unpacks = int(os.environ["LOCAL_RANK"]) == 0
    folder = Path(tempfile.gettempdir()) / on_rank_zero(lambda: f"nemo_dpo_{uuid.uuid4().hex}")
    try:
        agree(lambda: archive.extract(path, folder) if unpacks else None)
        yield folder
    finally:
        if unpacks:
            shutil.rmtree(folder, ignore_errors=True)


def _quieten_libraries() -> None:
    # They say once per rank what they found; levels, because their handlers are theirs.
    nemo_logging.setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
