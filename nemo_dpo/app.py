"""The composition root: the one place that builds everything from a configuration."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from nemo.utils import logging as nemo_logging

from nemo_dpo.checkpoint import SaveError, archive, sharded
from nemo_dpo.checkpoint.fingerprint import weights_hash
from nemo_dpo.checkpoint.folders import last_step, read_progress
from nemo_dpo.checkpoint.weights import check_metadata_pickle
from nemo_dpo.config import Config
from nemo_dpo.lora.spec import POLICY
from nemo_dpo.losses import build_objective
from nemo_dpo.model.architecture import Architecture, stated_vocab_size
from nemo_dpo.model.nemo_keys import TRAINING_ONLY
from nemo_dpo.parallel import cpu_host
from nemo_dpo.parallel.collective import agree, on_rank_zero
from nemo_dpo.parallel.engine import Engine, Evaluator
from nemo_dpo.parallel.experts import described
from nemo_dpo.parallel.groups import Groups, Layout, initialize
from nemo_dpo.parallel.watch import MARGIN, Watch, watching
from nemo_dpo.reference.adapter import AdapterReference
from nemo_dpo.reference.cached import CachedReference, fill
from nemo_dpo.reference.frozen import FrozenReference, Reference
from nemo_dpo.reference.table import rows_on_disk
from nemo_dpo.tokenizer import load_tokenizer
from nemo_dpo.training import nonfinite, run_log
from nemo_dpo.training.adapters import Adapted, export_adapter
from nemo_dpo.training.cadence import Cadence, CheckpointKeeper, Rhythm
from nemo_dpo.training.data import PairData
from nemo_dpo.training.finish import check_export, export_nemo, finish, nemo_path
from nemo_dpo.training.leave import Stopped, TimeLimit, any_request, leave, own_request
from nemo_dpo.training.module import PreferenceModule
from nemo_dpo.training.nonfinite import NonFinite
from nemo_dpo.training.policy import build_engine, build_evaluator
from nemo_dpo.training.resume import (
    Place,
    announce_steering,
    check_fixed,
    checkpoint_to_resume,
    fixed_facts,
    quantization,
    steering,
    this_job,
)
from nemo_dpo.training.space import check_room, expected_bytes
from nemo_dpo.training.strategy import MegatronStrategy
from nemo_dpo.training.wandb_log import check_wandb

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=Evaluator)


def train(cfg: Config) -> int:
    """A DPO run from its start, or from its newest checkpoint, to its end; returns the exit status."""
    return _run(_train, cfg)


def cache_reference(cfg: Config) -> int:
    """Compute what a run of kind `cached` would compute before it trains, and no more; returns the exit status."""
    return _run(_cache_reference, cfg)


def _run(job: Callable[[Config, Path, Groups, Watch], None], cfg: Config) -> int:
    """`job` among the ranks, to its end or until it is asked to stop."""
    stop, progress = None, ""
    with _ranks_at_work(cfg) as (groups, log_dir, watch):
        try:
            job(cfg, log_dir, groups, watch)
        except Stopped as stopped:
            logger.warning("ended %s (%s); start again to resume", stopped.where, stopped.stop.reason)
            progress = on_rank_zero(lambda: _progress(cfg, log_dir))
            stop = any_request(TimeLimit(None), groups.device) or stopped.stop  # what is cancelled by now
    if stop:
        leave(stop, progress)
    return 0


@contextmanager
def _ranks_at_work(cfg: Config) -> Iterator[tuple[Groups, Path, Watch]]:
    """The ranks, their log folder, and a watch over them."""
    with process_group(cfg) as groups:
        _quieten_libraries()
        log_dir = on_rank_zero(lambda: run_log.log_dir_of(cfg.exp_manager))  # it may ask the clock
        with watching(cfg.trainer.distributed_timeout_minutes * 60, log_dir / "stacks") as watch:
            yield groups, log_dir, watch


def _train(cfg: Config, log_dir: Path, groups: Groups, watch: Watch) -> None:
    on_rank_zero(lambda: check_wandb(cfg.exp_manager))
    resume = checkpoint_to_resume(cfg.exp_manager, log_dir / "checkpoints")
    with _started(cfg, log_dir, groups, build_engine) as start:
        facts, data = _facts(cfg, start), start.data
        place = _place_to_resume(resume, facts) if resume else Place()
        if cfg.exp_manager.create_checkpoint_callback:
            needed = expected_bytes(start.engine, cfg.model.optim)
            on_rank_zero(partial(check_room, log_dir / "checkpoints", needed))
        reference = build_reference(cfg, start)
        _stop_if_asked(start.limit, groups, "before the first step of this start")
        module, trainer, cadence = _build_trainer(cfg, start, reference, facts, place, watch)
        trainer.fit(module, data.train_loader(lambda: trainer.global_step), ckpt_path=str(resume) if resume else None)
        cadence.make_up(trainer, module)
        saved = cfg.exp_manager.create_checkpoint_callback
        stop = cadence.stop if saved or trainer.global_step < data.max_steps else None
        if not stop:
            try:
                finish(cfg, log_dir, module, data, partial(_export, start))
            except Stopped as stopped:
                stop = stopped.stop
        on_rank_zero(lambda: run_log.close_loggers(trainer))
        if stop and not saved:
            raise SaveError(
                f"asked to stop ({stop.reason}) after step {trainer.global_step} of {data.max_steps}: nothing is saved "
                "for exp_manager.create_checkpoint_callback=false, and a new start begins afresh"
            )
        if stop:
            raise Stopped(stop, f"after step {trainer.global_step} of {data.max_steps}")


def _cache_reference(cfg: Config, log_dir: Path, groups: Groups, watch: Watch) -> None:
    with _started(cfg, log_dir, groups, build_evaluator) as start:
        cached_reference(cfg, start)


def _stop_if_asked(limit: TimeLimit, groups: Groups, where: str) -> None:
    if stop := any_request(limit, groups.device):
        raise Stopped(stop, where)


def _progress(cfg: Config, log_dir: Path) -> str:
    """What the next start would find done."""
    return f"step {last_step(log_dir / 'checkpoints')}, {rows_on_disk(_cache_of(cfg, log_dir))} reference log-probs"


@dataclass(frozen=True)
class Start(Generic[E]):
    """A run before its first step.

    Attributes:
        base: the extracted checkpoint.
        weights: hash of its weights.
        engine: of a run that only asks the reference, an Evaluator.
        adapted: the adapter that is trained instead of the weights, with LoRA.
        limit: on the time of the run, from its start.
    """

    log_dir: Path
    base: Path
    weights: str
    model_config: dict[str, Any]
    data: PairData
    engine: E
    adapted: Adapted | None
    limit: TimeLimit


def _export(start: Start[Engine], path: Path) -> Path:
    """Write what is trained, as it is now, as a `.nemo`. Collective."""
    if start.adapted:
        return export_adapter(path, start.base, start.engine, start.adapted)
    return export_nemo(path, start.base, start.engine)


Build = Callable[[Config, Mapping[str, Any], Path, str, Groups], tuple[E, Adapted | None]]


@contextmanager
def _started(cfg: Config, log_dir: Path, groups: Groups, build: Build[E]) -> Iterator[Start[E]]:
    """The data, and the model with the checkpoint's weights."""
    limit = TimeLimit(cfg.exp_manager.max_time_per_run)

    def stop_rank_zero() -> None:
        if stop := own_request(limit):
            raise Stopped(stop, "while the data were prepared")

    on_rank_zero(lambda: run_log.save_run_facts(cfg, log_dir))
    with _extracted(Path(str(cfg.pretrained_checkpoint.restore_from_path))) as folder:
        model_config = archive.read_model_config(folder)
        check_metadata_pickle(folder / archive.MODEL_WEIGHTS)  # said before the data is prepared
        tokenizer = load_tokenizer(model_config.get("tokenizer") or {}, folder)
        model_config["vocab_size"] = stated_vocab_size(model_config) or tokenizer.vocab_size
        check_export(cfg, model_config)
        data = PairData.prepare(cfg, model_config, tokenizer, log_dir, groups, between_chunks=stop_rank_zero)
        _stop_if_asked(limit, groups, "before the model was built")
        weights = weights_hash(folder / archive.MODEL_WEIGHTS)
        engine, adapted = build(cfg, model_config, folder, weights, groups)
        if adapted:
            check_export(cfg, model_config, adapted.spec)
        yield Start(log_dir, folder, weights, model_config, data, engine, adapted, limit)


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
    timeout = datetime.timedelta(minutes=cfg.trainer.distributed_timeout_minutes) + MARGIN
    dist.init_process_group("gloo" if on_cpu else "nccl", timeout=timeout)
    try:
        yield initialize(layout_of(cfg, dist.get_world_size()), device, cfg.model.seed, timeout)
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
        ep=model.expert_model_parallel_size,
    )


def build_reference(cfg: Config, start: Start[Engine]) -> Reference:
    """The reference policy, of what the engine holds before any update.

    Raises:
        Stopped: asked to, while its log-probs were computed.
    """
    kind = cfg.model.reference_kind
    if kind.startswith("cached:"):
        return cached_reference(cfg, start)
    return FrozenReference(start.engine) if kind == "frozen" else AdapterReference(start.engine, _adapter_of(kind))


def _adapter_of(kind: str) -> str | None:
    """The adapter that is active at the start of a run for the log-probs of a reference kind."""
    return {"frozen": POLICY, "adapter_off": None}.get(kind, kind.removeprefix("adapter:"))


def _cache_of(cfg: Config, log_dir: Path) -> Path:
    return Path(cfg.model.dpo.reference.cache_dir or log_dir / "reference_cache").absolute()


def cached_reference(cfg: Config, start: Start[E]) -> CachedReference:
    """The log-probs of the model as it is now, by forward passes where they are not on disk yet. Collective.

    Raises:
        Stopped: asked to; what is computed so far is kept.
    """
    engine, adapter = start.engine, _adapter_of(cfg.model.reference_kind.removeprefix("cached:"))
    shape = {k: v for k, v in asdict(Architecture.parse(start.model_config)).items() if k not in TRAINING_ONLY}
    key = {
        "weights": start.weights,
        "base_quantization": quantization(cfg),
        "adapter": str(start.adapted and start.adapted.hashes.get(adapter or "")),
        "precision": "bf16" if cfg.trainer.bf16 else "fp32",
        "architecture": shape,
    }
    reference = fill(
        _cache_of(cfg, start.log_dir),
        key,
        start.data.pairs(),
        AdapterReference(engine, adapter).logps,
        engine.groups,
        pairs_per_pass=cfg.model.global_batch_size,
        stop=lambda: any_request(start.limit, engine.groups.device),
    )
    if reference is None:
        _stop_if_asked(start.limit, engine.groups, "while reference log-probs were computed")
        raise AssertionError("`fill` stops if asked only, and requests are not taken back")
    return reference


def _facts(cfg: Config, start: Start[Engine]) -> dict[str, Any]:
    """What a checkpoint records of its run, beside where it is."""
    adapter = start.adapted.facts if start.adapted else {}
    more = {**start.data.facts, **described(start.engine.routers), **adapter}
    return {
        "layout": sharded.layout_of(start.engine),
        "fixed": fixed_facts(cfg, start.weights, more),
        "steering": steering(cfg, start.data.max_steps),
    }


def _place_to_resume(checkpoint: Path, facts: Mapping[str, Any]) -> Place:
    """Where `checkpoint` is, if it was written by a run that this start may go on with."""
    progress = read_progress(checkpoint)
    check_fixed(progress, facts["fixed"])
    announce_steering(progress, facts["steering"])
    return Place(int(progress["step"]), bool(progress.get("validation_due", False)))


def _build_trainer(
    cfg: Config, start: Start[Engine], reference: Reference, facts: Mapping[str, Any], place: Place, watch: Watch
) -> tuple[PreferenceModule, pl.Trainer, Cadence]:
    log_dir, engine, data = start.log_dir, start.engine, start.data
    requested = partial(any_request, start.limit, engine.groups.device)
    saves = cfg.exp_manager.create_checkpoint_callback
    module = PreferenceModule(
        engine,
        reference,
        build_objective(cfg.model.dpo),
        cfg.model.optim,
        clip_grad=cfg.trainer.dpo.gradient_clip_val,
        nonfinite=NonFinite(cfg.trainer.dpo, log_dir / nonfinite.FILE, data.source, engine.groups),
        watch=watch,
        # Where no checkpoint is written, nothing is gained by a validation that ends early.
        requested=requested if saves else lambda: None,
        first_step=place.step,
        max_steps=data.max_steps,
    )
    params = cfg.exp_manager.checkpoint_callback_params
    keeper = CheckpointKeeper(log_dir / "checkpoints", params, mark=watch.mark) if saves else None
    rhythm = Rhythm(
        max_steps=data.max_steps,
        val_interval=data.validation_interval,
        save_interval=cfg.trainer.dpo.save_interval,
        log_interval=cfg.trainer.log_every_n_steps,
        sampler=data.sampler,
    )
    export = partial(_export, start, nemo_path(cfg, log_dir)) if params.always_save_nemo else None
    cadence = Cadence(rhythm, data.batches("validation"), keeper, place, requested, after_save=export)
    module.progress = lambda: {
        **data.position(module.trainer.global_step),
        "validation_due": cadence.validation_due,
        **facts,
        **this_job(),
    }
    trainer = pl.Trainer(
        accelerator="cpu" if engine.groups.device.type == "cpu" else "gpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=engine.groups.layout.world // int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=MegatronStrategy(engine, background_saves=params.async_save),
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
    run_log.attach_loggers(trainer, cfg.exp_manager, log_dir, place)
    return module, trainer, cadence


@contextmanager
def _extracted(path: Path) -> Iterator[Path]:
    """The archive as a folder that every rank of this host can read; it is unpacked once a host."""
    if path.is_dir():
        with archive.open_folder(path) as folder:
            yield folder
        return
    unpacks = int(os.environ["LOCAL_RANK"]) == 0
    # Of each host its own: they may share the folder for temporary files.
    name = f"{on_rank_zero(lambda: f'nemo_dpo_{uuid.uuid4().hex}')}_{os.environ['GROUP_RANK']}"
    folder = Path(tempfile.gettempdir()) / name
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
