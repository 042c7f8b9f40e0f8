"""The policy of a run: a checkpoint's model under the run's layout, with its adapters, to train or only to ask."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_dpo.checkpoint import CheckpointError, archive, sharded
from nemo_dpo.config import Config, ConfigError
from nemo_dpo.model.architecture import Architecture
from nemo_dpo.model.build import BuildOptions, build_model, has_transformer_engine
from nemo_dpo.model.gpt import ResponseGPT
from nemo_dpo.parallel.engine import Engine, Evaluator, weights_swapped
from nemo_dpo.parallel.groups import Groups
from nemo_dpo.quantization.linear import quantize_
from nemo_dpo.quantization.nf4 import UnpackableError
from nemo_dpo.training.adapters import Adapted, adapt

logger = logging.getLogger(__name__)

Exact = list[tuple[torch.nn.Parameter, torch.Tensor]]  # what is trained on this rank, and its values in fp32


def build_engine(
    cfg: Config, model_config: Mapping[str, Any], folder: Path, weights: str, groups: Groups
) -> tuple[Engine, Adapted | None]:
    """The model of the extracted archive `folder` under this run's layout, with its adapters and its optimizer.

    Args:
        weights: hash of the archive's weights.
    """
    arch = Architecture.parse(model_config)
    chunks, transformer = build_model(arch, groups, build_options(cfg, model_config))
    adapted = None
    if cfg.model.peft.lora:
        adapted, exact = _load_adapted(cfg, arch, folder, weights, chunks, groups)
    else:
        exact = _load_exact(folder / archive.MODEL_WEIGHTS, chunks)
    engine = Engine(chunks, transformer, groups, cfg.model.optim)
    engine.refine_masters(exact)
    logger.info(
        "model: %.1f M parameters on this rank%s, %.1f M of them trained; %s",
        sum(p.numel() for c in chunks for p in c.parameters()) / 1e6,
        " beside those in 4 bits" if cfg.model.peft.base_quantization else "",
        sum(p.numel() for p in engine.trainable) / 1e6,
        groups.layout,
    )
    return engine, adapted


def build_evaluator(
    cfg: Config, model_config: Mapping[str, Any], folder: Path, weights: str, groups: Groups
) -> tuple[Evaluator, Adapted | None]:
    """As `build_engine`, without what training needs."""
    arch = Architecture.parse(model_config)
    chunks, _ = build_model(arch, groups, build_options(cfg, model_config))
    if cfg.model.peft.lora:
        adapted, _ = _load_adapted(cfg, arch, folder, weights, chunks, groups)
        return Evaluator(chunks, groups), adapted
    sharded.load_weights(folder / archive.MODEL_WEIGHTS, chunks)
    return Evaluator(chunks, groups), None


def _load_adapted(
    cfg: Config, arch: Architecture, folder: Path, weights: str, chunks: list[ResponseGPT], groups: Groups
) -> tuple[Adapted, Exact]:
    """Fill the chunks, in 4 bits if the run says so, and attach its adapters."""
    if cfg.model.peft.base_quantization:
        try:
            quantize_(sharded.load_by_layer(folder / archive.MODEL_WEIGHTS, chunks, groups.device))
        except UnpackableError as error:
            raise CheckpointError(f"{cfg.pretrained_checkpoint.restore_from_path}: {error}") from error
    else:
        sharded.load_weights(folder / archive.MODEL_WEIGHTS, chunks)
    return adapt(chunks, cfg.model.peft, arch.dimensions, weights, cfg.model.seed, groups.layout)


def _load_exact(weights: Path, chunks: list[ResponseGPT]) -> Exact:
    """Fill the chunks; returns their parameters with their weights in fp32: of a model in bf16 the unrounded ones."""
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    exact = [p.detach().to(torch.float32) for p in parameters]
    with weights_swapped(parameters, exact):
        sharded.load_weights(weights, chunks)
    for parameter, tensor in zip(parameters, exact, strict=True):
        parameter.data.copy_(tensor)
    return list(zip(parameters, exact, strict=True))


def build_options(cfg: Config, model_config: Mapping[str, Any]) -> BuildOptions:
    """What `model` says about precision, kernels, recompute and dropout; null is what the checkpoint says."""
    model = cfg.model
    wanted = model.transformer_engine
    if wanted and not has_transformer_engine():
        raise ConfigError(
            "model.transformer_engine=true but transformer_engine cannot be imported here; use null or false"
        )
    granularity, method, num_layers = recompute_options(cfg, model_config)
    # Neither adapters nor experts are offered in its layers.
    usual = has_transformer_engine() and not model.peft.lora and not model_config.get("num_moe_experts")
    return BuildOptions(
        dtype=torch.bfloat16 if cfg.trainer.bf16 else torch.float32,
        transformer_engine=usual if wanted is None else wanted,
        recompute_granularity=granularity,
        recompute_method=method,
        recompute_num_layers=num_layers,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        load_balancing=model.moe_router_load_balancing_type,
        load_balancing_weight=model.moe_aux_loss_coeff,
        deterministic=model.deterministic,
        hollow=model.peft.base_quantization is not None,
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
