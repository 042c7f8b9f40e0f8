"""Checks of a loaded configuration: alone, against the ranks present, against the checkpoint's model.

Each raises one :class:`ConfigError` with a line per problem: key, value, limit, remedy. None needs torch, so a run that
cannot work ends before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemo_dpo.config.architecture import Architecture
from nemo_dpo.config.data_sources import data_sources
from nemo_dpo.config.errors import ConfigError
from nemo_dpo.config.limits import beyond_limits
from nemo_dpo.config.schema import Config

_TP = "model.tensor_model_parallel_size"
_PP = "model.pipeline_model_parallel_size"
_VPP = "model.virtual_pipeline_model_parallel_size"


def check(cfg: Config) -> None:
    """All that can be judged without the checkpoint; with the ranks too, where trainer.devices counts them."""
    _raise_if([*beyond_limits(cfg), *_missing(cfg)])
    _raise_if([*_objective(cfg), *_schedule(cfg), *_folders(cfg), *_pipeline(cfg), *_absent_files(cfg)])
    if isinstance(cfg.trainer.devices, int):
        check_layout(cfg, cfg.trainer.devices * cfg.trainer.num_nodes)


def check_layout(cfg: Config, world_size: int) -> None:
    """Parallel and batch sizes against ``world_size`` ranks."""
    model = cfg.model
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise ConfigError(
            f"{_TP}={tp} × {_PP}={pp} = {tp * pp} must divide the number of ranks, {world_size}; "
            "change trainer.devices × trainer.num_nodes or the parallel sizes"
        )
    dp = world_size // (tp * pp)
    _raise_if(_batch_sizes(cfg, dp))


def check_model(cfg: Config, model_config: Mapping[str, Any]) -> None:
    """Against ``model_config``, the checkpoint's model_config.yaml: shapes, and what layers are divided by."""
    _raise_if(_changed_shapes(cfg, model_config))
    _raise_if([*_divisions(cfg, model_config), *_sequence_length(cfg, model_config), *_recompute(cfg, model_config)])


def _raise_if(problems: Iterable[str]) -> None:
    if lines := list(problems):
        raise ConfigError("\n".join(lines))


def _missing(cfg: Config) -> Iterator[str]:
    missing = {}
    if not cfg.pretrained_checkpoint.restore_from_path:
        missing["a checkpoint to start from"] = "pretrained_checkpoint.restore_from_path=/path/model.nemo"
    if not cfg.model.data.data_prefix:
        missing["preference pairs"] = (
            '"model.data.data_prefix={train: [/path/train.jsonl], validation: [/path/valid.jsonl]}"'
        )
    if missing:
        yield f"missing: {' and '.join(missing)}. Add to the command, or to the yaml: {' '.join(missing.values())}"


def _absent_files(cfg: Config) -> Iterator[str]:
    start = Path(str(cfg.pretrained_checkpoint.restore_from_path))
    if not start.exists():
        yield f"pretrained_checkpoint.restore_from_path={start} does not exist; give a .nemo or its extracted folder"
    for split, sources in data_sources(cfg).items():
        for source in sources:
            if not source.path.is_file():
                yield f"model.data.data_prefix: {split} file {source.path} does not exist or is not a file"


def _objective(cfg: Config) -> Iterator[str]:
    dpo = cfg.model.dpo
    if dpo.preference_loss_weight == 0 and dpo.sft_loss_weight == 0:
        yield (
            "model.dpo.preference_loss_weight=0 and model.dpo.sft_loss_weight=0 leave no loss; "
            "set one of them to a number greater than 0"
        )


def _schedule(cfg: Config) -> Iterator[str]:
    optim, sched = cfg.model.optim, cfg.model.optim.sched
    if sched.warmup_steps is not None and sched.warmup_ratio is not None:
        yield (
            f"model.optim.sched.warmup_steps={sched.warmup_steps} and model.optim.sched.warmup_ratio="
            f"{sched.warmup_ratio} are both given; set one of them to null"
        )
    if sched.min_lr > optim.lr:
        yield (
            f"model.optim.sched.min_lr={sched.min_lr} is above model.optim.lr={optim.lr}; "
            "lower model.optim.sched.min_lr"
        )
    if optim.momentum and optim.name != "sgd":
        yield f"model.optim.momentum={optim.momentum} is sgd's; model.optim.name={optim.name} uses model.optim.betas"


def _folders(cfg: Config) -> Iterator[str]:
    exp = cfg.exp_manager
    for key, value in (("exp_dir", exp.exp_dir), ("version", exp.version)):
        if exp.explicit_log_dir is not None and value is not None:
            yield (
                f"exp_manager.{key}={value} has no effect beside exp_manager.explicit_log_dir={exp.explicit_log_dir}; "
                f"set one of them to null"
            )
    size = cfg.model.tensor_model_parallel_size * cfg.model.pipeline_model_parallel_size
    given = exp.checkpoint_callback_params.model_parallel_size
    if given not in (None, size):
        yield (
            f"exp_manager.checkpoint_callback_params.model_parallel_size={given} must be {_TP} × {_PP} = {size}; "
            "leave it out"
        )


def _pipeline(cfg: Config) -> Iterator[str]:
    chunks, pp = cfg.model.virtual_pipeline_model_parallel_size, cfg.model.pipeline_model_parallel_size
    if chunks is not None and chunks > 1 and pp < 2:
        yield f"{_VPP}={chunks} needs {_PP} of at least 2, not {pp}; raise {_PP} or set {_VPP}=null"


def _batch_sizes(cfg: Config, dp: int) -> Iterator[str]:
    model = cfg.model
    unit = model.micro_batch_size * dp
    if model.global_batch_size % unit:
        nearest = max(1, round(model.global_batch_size / unit)) * unit
        yield (
            f"model.global_batch_size={model.global_batch_size} must be a multiple of model.micro_batch_size="
            f"{model.micro_batch_size} × {dp} data-parallel ranks = {unit}; set model.global_batch_size={nearest}"
        )
    reference = model.dpo.log_prob_forward_micro_batch_size
    if reference != model.micro_batch_size:
        yield (
            f"model.dpo.log_prob_forward_micro_batch_size={reference} must be model.micro_batch_size="
            f"{model.micro_batch_size}: the reference runs on the policy's micro-batches; leave it out"
        )


def _changed_shapes(cfg: Config, model_config: Mapping[str, Any]) -> Iterator[str]:
    for item in fields(Architecture):
        wanted, held = getattr(cfg.model, item.name), model_config.get(item.name)
        if item.name == "tokenizer" and wanted is not None and isinstance(held, Mapping):
            held = {**wanted, **{key: held.get(key) for key in wanted}}
        if wanted is not None and wanted != held:
            yield (
                f"model.{item.name}={wanted!r} differs from the checkpoint's {held!r}; the checkpoint fixes its shape, "
                f"so leave model.{item.name} out"
            )


def _divisions(cfg: Config, model_config: Mapping[str, Any]) -> Iterator[str]:
    tp = cfg.model.tensor_model_parallel_size
    heads = int(model_config["num_attention_heads"])
    groups = int(model_config.get("num_query_groups") or heads)
    ffn = int(model_config["ffn_hidden_size"])
    if heads % tp:
        yield f"{_TP}={tp} must divide the model's num_attention_heads={heads}; {_TP} may be {_divisors(heads)}"
    # megatron-core repeats key/value heads where there are more ranks than groups.
    elif groups % tp and tp % groups:
        yield f"{_TP}={tp} must divide, or be a multiple of, the model's num_query_groups={groups}; change {_TP}"
    if ffn % tp:
        yield f"{_TP}={tp} must divide the model's ffn_hidden_size={ffn}; change {_TP}"
    layers, pp = int(model_config["num_layers"]), cfg.model.pipeline_model_parallel_size
    chunks = cfg.model.virtual_pipeline_model_parallel_size or 1
    if layers % (pp * chunks):
        product = f"{_PP}={pp}" + (f" × {_VPP}={chunks} = {pp * chunks}" if chunks > 1 else "")
        yield f"{product} must divide the model's num_layers={layers}, that is be one of {_divisors(layers)}"


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


def _sequence_length(cfg: Config, model_config: Mapping[str, Any]) -> Iterator[str]:
    longest = model_config.get("max_position_embeddings")
    wanted = cfg.model.data.seq_length
    if wanted is not None and longest is not None and wanted > longest:
        yield (
            f"model.data.seq_length={wanted} is longer than the model's max_position_embeddings={longest}; "
            f"set model.data.seq_length={longest} or less"
        )


def _recompute(cfg: Config, model_config: Mapping[str, Any]) -> Iterator[str]:
    effective = {
        key: getattr(cfg.model, key) or model_config.get(key)
        for key in (f"activations_checkpoint_{part}" for part in ("granularity", "method", "num_layers"))
    }
    absent = [key for key, value in effective.items() if value is None]
    if effective["activations_checkpoint_granularity"] == "full" and absent:
        wanted = " ".join(f"model.{key}=…" for key in absent)
        yield f"model.activations_checkpoint_granularity=full also needs {wanted}; method uniform, num_layers 1 will do"
