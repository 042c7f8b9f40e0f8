"""Checks of a loaded configuration: alone, against the ranks present, against the checkpoint's model.

Each raises one :class:`ConfigError` with a line per problem: key, value, limit, remedy. None needs torch, so a run that
cannot work ends before anything heavy is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_dpo.config.architecture import Architecture
from nemo_dpo.config.checkpoint_names import name_problems
from nemo_dpo.config.data_sources import data_sources
from nemo_dpo.config.errors import ConfigError
from nemo_dpo.config.limits import beyond_limits
from nemo_dpo.config.peft import stage_without_adapter
from nemo_dpo.config.schema import Config
from nemo_dpo.config.secrets import secrets

_TP = "model.tensor_model_parallel_size"
_PP = "model.pipeline_model_parallel_size"
_VPP = "model.virtual_pipeline_model_parallel_size"
_EP = "model.expert_model_parallel_size"

# Keys of the layout over ranks → what null means.
_LAYOUT = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
_LAYOUT |= {"virtual_pipeline_model_parallel_size": 1, "sequence_parallel": False, "expert_model_parallel_size": 1}


def check(cfg: Config) -> None:
    """All that can be judged without the checkpoint; with the ranks too, where trainer.devices counts them."""
    _raise_if([*beyond_limits(cfg), *_missing(cfg)])
    tests = (secrets, _objective, _reference_folder, _schedule, _folders, _saves, _pipeline, _adapters, _absent_files)
    _raise_if(problem for test in tests for problem in test(cfg))
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
    dp, ep = world_size // (tp * pp), model.expert_model_parallel_size
    if dp % ep:
        raise ConfigError(
            f"{_EP}={ep} must divide the number of data-parallel ranks, {world_size} / ({_TP}={tp} × {_PP}={pp}) = "
            f"{dp}; change trainer.devices × trainer.num_nodes or the parallel sizes"
        )
    _raise_if(_batch_sizes(cfg, dp))


def check_model(cfg: Config, model_config: Mapping[str, Any]) -> None:
    """Against ``model_config``, the checkpoint's model_config.yaml with NeMo's defaults: shapes, and divisors."""
    _raise_if(_changed_shapes(cfg, model_config))
    _raise_if([*_divisions(cfg, model_config), *_sequence_length(cfg, model_config)])
    _raise_if([*_recompute(cfg, model_config), *_layer_selection(cfg, model_config), *_experts(cfg, model_config)])


def check_folders(cfg: Config) -> None:
    """Folders that this run may have to make: results, and cached log-probs, which may be there to be read only."""
    results = cfg.exp_manager.explicit_log_dir or cfg.exp_manager.exp_dir or "."
    cache = cfg.model.dpo.reference.cache_dir
    _raise_if(_unmakable("results folder", results, "exp_manager.explicit_log_dir"))
    if cache is not None and not Path(cache).is_dir():
        _raise_if(_unmakable("folder of log-probs", cache, "model.dpo.reference.cache_dir"))


def layout_notice(cfg: Config, model_config: Mapping[str, Any]) -> str:
    """One line if the checkpoint's configuration names another layout than this run's, else "".

    NeMo-Aligner would take it over. Here the weights fit any layout, and the ranks of a laptop no other than 1.
    """
    held = {key: model_config.get(key) or neutral for key, neutral in _LAYOUT.items()}
    own = {key: getattr(cfg.model, key) or neutral for key, neutral in _LAYOUT.items()}
    other = [key for key in _LAYOUT if held[key] != own[key]]
    if not other:
        return ""
    there, here = (", ".join(f"{key}={values[key]}" for key in other) for values in (held, own))
    return f"layout: the checkpoint's configuration has {there}; this run has {here}, for only model.* keys set it"


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
    peft = cfg.model.peft
    frozen = {f"frozen_adapters.{name}": file for name, file in peft.frozen_adapters.items()}
    for key, file in {"restore_from_path": peft.restore_from_path, **frozen}.items():
        if file is not None and not Path(file).exists():
            yield f"model.peft.{key}={file} does not exist; give an adapter .nemo or its extracted folder"
    checkpoint = cfg.exp_manager.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        yield f"exp_manager.resume_from_checkpoint={checkpoint} is not a folder; give one below checkpoints/ of a run"
    for split, sources in data_sources(cfg).items():
        for source in sources:
            if not source.path.is_file():
                yield f"model.data.data_prefix: {split} file {source.path} does not exist or is not a file"


def _unmakable(what: str, given: str, key: str) -> Iterator[str]:
    folder = Path(given).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        yield f"the {what} {folder} cannot be made: {there} is not a folder that may be written; set {key}"


def _objective(cfg: Config) -> Iterator[str]:
    dpo = cfg.model.dpo
    if dpo.preference_loss_weight == 0 and dpo.sft_loss_weight == 0:
        yield (
            "model.dpo.preference_loss_weight=0 and model.dpo.sft_loss_weight=0 leave no loss; "
            "set one of them to a number greater than 0"
        )


def _reference_folder(cfg: Config) -> Iterator[str]:
    folder, kind = cfg.model.dpo.reference.cache_dir, cfg.model.reference_kind
    if folder is not None and not kind.startswith("cached"):
        yield (
            f"model.dpo.reference.cache_dir={folder} has no effect with model.dpo.reference.kind={kind}; set the kind "
            "to cached or leave cache_dir out"
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


def _saves(cfg: Config) -> Iterator[str]:
    exp, params = cfg.exp_manager, cfg.exp_manager.checkpoint_callback_params
    yield from name_problems(params)
    if exp.hf_export_on_train_end and not params.save_nemo_on_train_end:
        yield (
            "exp_manager.hf_export_on_train_end=true is made from the trained .nemo, which "
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false leaves out; set that to true"
        )
    if params.always_save_nemo and not exp.create_checkpoint_callback:
        yield (
            "exp_manager.checkpoint_callback_params.always_save_nemo=true writes a .nemo at every save, and "
            "exp_manager.create_checkpoint_callback=false leaves no saves; set one of them the other way"
        )


def _pipeline(cfg: Config) -> Iterator[str]:
    chunks, pp = cfg.model.virtual_pipeline_model_parallel_size, cfg.model.pipeline_model_parallel_size
    if chunks is not None and chunks > 1 and pp < 2:
        yield f"{_VPP}={chunks} needs {_PP} of at least 2, not {pp}; raise {_PP} or set {_VPP}=null"


def _adapters(cfg: Config) -> Iterator[str]:
    peft, kind = cfg.model.peft, cfg.model.reference_kind
    if not peft.lora:
        if "adapter" in kind:
            yield f"model.dpo.reference.kind={kind} needs an adapter; set model.peft.peft_scheme=lora, or kind=frozen"
        for key in ("restore_from_path", "frozen_adapters", "base_quantization"):
            if value := getattr(peft, key):
                yield f"model.peft.{key}={value} has no effect; set model.peft.peft_scheme=lora or leave it out"
    elif cfg.model.transformer_engine:
        yield (
            "model.transformer_engine=true: adapters are not offered on Transformer Engine's layers, which hide the "
            "input of the linear layer behind a fused norm; set it to null"
        )
    if peft.base_quantization and find_spec("bitsandbytes") is None:
        yield (
            f"model.peft.base_quantization={peft.base_quantization} needs bitsandbytes, which is not installed; "
            "pip install bitsandbytes"
        )
    _, named, name = kind.partition("adapter:")
    if named and peft.lora and name not in peft.frozen_adapters:
        known = ", ".join(peft.frozen_adapters) or "none"
        yield (
            f"model.dpo.reference.kind={kind}: model.peft.frozen_adapters has no {name!r} (known: {known}); add "
            f"+model.peft.frozen_adapters.{name}=/path/adapter.nemo"
        )


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
                f"model.{item.name}={wanted!r} differs from the checkpoint's {held!r}; the checkpoint decides, "
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
    elif cfg.model.peft.lora and groups % tp:
        yield f"{_TP}={tp} must divide the model's num_query_groups={groups} with LoRA; change {_TP}"
    if ffn % tp:
        yield f"{_TP}={tp} must divide the model's ffn_hidden_size={ffn}; change {_TP}"
    layers, pp = int(model_config["num_layers"]), cfg.model.pipeline_model_parallel_size
    chunks = cfg.model.virtual_pipeline_model_parallel_size or 1
    if layers % (pp * chunks):
        product = f"{_PP}={pp}" + (f" × {_VPP}={chunks} = {pp * chunks}" if chunks > 1 else "")
        yield f"{product} must divide the model's num_layers={layers}, that is be one of {_divisors(layers)}"


def _layer_selection(cfg: Config, model_config: Mapping[str, Any]) -> Iterator[str]:
    selected, layers = cfg.model.peft.lora_tuning.layer_selection or [], int(model_config["num_layers"])
    if selected and max(selected) > layers:
        yield f"model.peft.lora_tuning.layer_selection names layer {max(selected)}; the model has layers 1 to {layers}"
    chunks = cfg.model.pipeline_model_parallel_size * (cfg.model.virtual_pipeline_model_parallel_size or 1)
    if selected and layers % chunks == 0 and (problem := stage_without_adapter(selected, layers, chunks)):
        yield f"model.peft.lora_tuning.layer_selection={selected}: {problem}"


def _experts(cfg: Config, model_config: Mapping[str, Any]) -> Iterator[str]:
    model, experts = cfg.model, model_config.get("num_moe_experts")
    ep, tp = model.expert_model_parallel_size, model.tensor_model_parallel_size
    if not experts:
        if ep > 1:
            yield f"{_EP}={ep} needs a model with experts, and the checkpoint's has none; leave it out"
        for key in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
            if (value := getattr(model, key)) is not None:
                yield f"model.{key}={value} has no effect: the checkpoint's model has no experts; leave it out"
        return
    if int(experts) % ep:
        yield f"{_EP}={ep} must divide the model's num_moe_experts={experts}, that is be one of {_divisors(experts)}"
    if tp > 1 and not model.sequence_parallel:
        yield f"{_TP}={tp} with experts needs model.sequence_parallel=true; set it"
    if model.transformer_engine:
        yield "model.transformer_engine=true: experts are not offered in Transformer Engine's layers; set it to null"
    targets = model.peft.lora_tuning.target_modules or []
    if model.peft.lora and (wrong := [name for name in targets if name in ("mlp", "mlp_fc1", "mlp_fc2", "all")]):
        yield (
            f"model.peft.lora_tuning.target_modules={targets}: {', '.join(wrong)} names experts, which can have no "
            "adapters; use attention, attention_qkv or attention_dense"
        )
    if model.peft.base_quantization:
        yield (
            f"model.peft.base_quantization={model.peft.base_quantization} is not offered for a model with experts; set "
            "it to null"
        )


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
    if effective["activations_checkpoint_granularity"] is None:
        for key in ("activations_checkpoint_method", "activations_checkpoint_num_layers"):
            if (value := getattr(cfg.model, key)) is not None:
                yield (
                    f"model.{key}={value} has no effect without model.activations_checkpoint_granularity=full; "
                    f"set that too, or leave model.{key} out"
                )
    if effective["activations_checkpoint_granularity"] == "full" and absent:
        wanted = " ".join(f"model.{key}=…" for key in absent)
        yield f"model.activations_checkpoint_granularity=full also needs {wanted}; method uniform, num_layers 1 will do"
