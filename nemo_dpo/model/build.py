"""Architecture + layout → the model chunks of this rank."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_dpo.lora.linear import LoraColumnParallelLinear, LoraRowParallelLinear
from nemo_dpo.model.architecture import Architecture
from nemo_dpo.model.gpt import ResponseGPT
from nemo_dpo.model.layers import CausalAttention, Norm, ParallelResidualLayer
from nemo_dpo.parallel.experts import Router, mark_experts
from nemo_dpo.parallel.groups import Groups, Layout

logger = logging.getLogger(__name__)

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "squared_relu": squared_relu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class BuildOptions:
    """What the run decides about the model, beside its architecture.

    Attributes:
        dtype: of the parameters and the activations.
        transformer_engine: use its layers.
        recompute_granularity, recompute_method, recompute_num_layers: megatron-core's activation recompute.
        hidden_dropout, attention_dropout: override the checkpoint's where not None.
        load_balancing, load_balancing_weight: override the checkpoint's where not None.
        logps_chunk: response positions projected to the vocabulary at once.
        deterministic: ask megatron-core and Transformer Engine for deterministic kernels.
        hollow: the linear layers' weights take no memory until `checkpoint.sharded.load_by_layer` fills them.
    """

    dtype: torch.dtype
    transformer_engine: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    hidden_dropout: float | None = None
    attention_dropout: float | None = None
    load_balancing: str | None = None
    load_balancing_weight: float | None = None
    logps_chunk: int = 1024
    deterministic: bool = False
    hollow: bool = False


# Layer → the dimension of its weight that the tp ranks share. (Transformer Engine's layers mark their own.)
PARTITIONED = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}


def has_transformer_engine() -> bool:
    """Whether megatron-core has found Transformer Engine."""
    return bool(HAVE_TE)


def transformer_config(arch: Architecture, groups: Groups, options: BuildOptions) -> TransformerConfig:
    """megatron-core's configuration of one run. Losses are summed and divided once, by `parallel.engine`."""
    layout, on_cpu = groups.layout, groups.device.type == "cpu"
    fused = options.transformer_engine
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        normalization=arch.normalization,
        layernorm_zero_centered_gamma=arch.zero_centered_norm,
        layernorm_epsilon=arch.layernorm_epsilon,
        activation_func=ACTIVATIONS[arch.activation],
        gated_linear_unit=arch.gated,
        add_bias_linear=arch.linear_bias,
        add_qkv_bias=arch.qkv_bias,
        rotary_interleaved=arch.rotary_interleaved,
        window_size=None if arch.window is None else (arch.window, 0),
        qk_layernorm=arch.qk_norm,
        hidden_dropout=arch.hidden_dropout if options.hidden_dropout is None else options.hidden_dropout,
        attention_dropout=arch.attention_dropout if options.attention_dropout is None else options.attention_dropout,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        # Batched sends of the interleaved schedule get mixed up where previous and next stage are one rank (pp = 2).
        batch_p2p_comm=layout.vpp is None,
        overlap_p2p_comm=layout.vpp is not None,
        bf16=options.dtype is torch.bfloat16,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        calculate_per_token_loss=True,
        **_expert_options(arch, layout, options),
        deterministic_mode=options.deterministic,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,  # every parameter is read from the checkpoint
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused,
        persist_layer_norm=fused,
    )


def _expert_options(arch: Architecture, layout: Layout, options: BuildOptions) -> dict[str, Any]:
    if arch.experts is None:
        return {}
    kind, weight = options.load_balancing, options.load_balancing_weight
    return {
        "num_moe_experts": arch.experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.ffn_hidden_size,
        "moe_router_load_balancing_type": arch.load_balancing if kind is None else kind,
        "moe_aux_loss_coeff": arch.load_balancing_weight if weight is None else weight,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",  # data-parallel ranks have rows of different lengths
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp,
    }


def layer_specs(
    arch: Architecture, config: TransformerConfig, options: BuildOptions, vp_stage: int | None
) -> TransformerBlockSubmodules | ModuleSpec:
    """Transformer Engine's layers, or megatron-core's local ones with the parts of `model.layers` and `lora.linear`."""
    fused = options.transformer_engine
    if fused:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm)
    else:
        layer = _local_layer(arch, hollow=options.hollow)
    if arch.parallel_residual:
        layer.module = ParallelResidualLayer
    if fused:
        return layer
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)


def _local_layer(arch: Architecture, *, hollow: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(num_experts=arch.experts, normalization=arch.normalization)
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.core_attention = CausalAttention
    column = ModuleSpec(LoraColumnParallelLinear, params={"hollow": hollow})
    row = ModuleSpec(LoraRowParallelLinear, params={"hollow": hollow})
    attention.linear_qkv, attention.linear_proj = column, row
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if arch.experts is None:
        mlp.linear_fc1, mlp.linear_fc2 = column, row
    else:
        mlp.router = Router
        # A norm of its own, as in Transformer Engine's layer: archives have it under that name.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return layer


def build_model(
    arch: Architecture, groups: Groups, options: BuildOptions
) -> tuple[list[ResponseGPT], TransformerConfig]:
    """The chunks of this pipeline rank (one, or `vpp` of them), on this rank's device, parameters not yet filled."""
    config = transformer_config(arch, groups, options)
    stages: list[int | None] = [None] if groups.layout.vpp is None else list(range(groups.layout.vpp))
    chunks = [_build_chunk(arch, groups, options, config, stage) for stage in stages]
    logger.info(
        "layers: %s, %s",
        "Transformer Engine" if options.transformer_engine else "megatron-core local + SDPA",
        options.dtype,
    )
    return chunks, config


def _build_chunk(
    arch: Architecture, groups: Groups, options: BuildOptions, config: TransformerConfig, stage: int | None
) -> ResponseGPT:
    chunk = ResponseGPT(
        config=config,
        transformer_layer_spec=layer_specs(arch, config, options, stage),
        vocab_size=arch.padded_vocab_size(groups.layout.tp),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=groups.is_first_stage(stage),
        post_process=groups.is_last_stage(stage),
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type=arch.position_embedding,
        rotary_percent=arch.rotary_percent,
        rotary_base=arch.rotary_base,
        rope_scaling=arch.rope_scaling is not None,
        rope_scaling_factor=arch.rope_scaling.factor if arch.rope_scaling else 1.0,
        seq_len_interpolation_factor=arch.rope_interpolation,
        pg_collection=groups.collection,
        vp_stage=stage,
    )
    chunk.real_vocab_size = arch.vocab_size
    chunk.logps_chunk = options.logps_chunk
    chunk.embedding_scale = math.sqrt(arch.hidden_size) if arch.scaled_embedding else None
    _mark_partitioned(chunk)
    mark_experts(chunk)
    return chunk._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(groups.device))


def _mark_partitioned(chunk: nn.Module) -> None:
    # megatron-core marks a parameter as shared out over the tp ranks while it initialises it, which is skipped here;
    # the gradient norm counts an unmarked one on the first tp rank only.
    for module in chunk.modules():
        for kind, dim in PARTITIONED.items():
            if isinstance(module, kind) and module.weight is not None:
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
