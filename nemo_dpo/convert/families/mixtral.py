"""Mixtral: Mistral's attention, and in place of the MLP experts of which a router chooses some for each token.

Hugging Face takes a softmax over all experts, keeps the largest and divides them by their sum; megatron-core keeps the
largest logits and takes the softmax of those. Both are e^z / Σ e^z over the chosen.

Files have a matrix for each expert, also those that transformers 5 writes, which holds them in one tensor in memory.
megatron-core stacks an expert's parameters behind its layers', [layers, experts, …], as NeMo's own archives do.
"""

from __future__ import annotations

from typing import Any

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.families import llama
from nemo_dpo.convert.families.common import (
    EXPERT_FC1,
    EXPERT_FC2,
    EXPERTS_NORM,
    NO_BIASES,
    ROUTER,
    changed,
    linear,
    norm,
    window_to_hf,
    window_to_nemo,
)
from nemo_dpo.convert.family import Family, Key
from nemo_dpo.convert.rope import RopeKeys
from nemo_dpo.convert.rules import Copy, GatedMlp, Param, PerExpert, Rule, Table

DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
KEYS = (
    *changed(llama.KEYS, DEFAULTS),
    Key("num_local_experts", "num_moe_experts", 8),
    Key("num_experts_per_tok", "moe_router_topk", 2),
    Key("router_aux_loss_coef", "moe_aux_loss_coeff", 0.001),
)
BLOCK = "model.layers.{layer}.block_sparse_moe"
EXPERT = f"{BLOCK}.experts.{{expert}}"


def _experts(count: int) -> tuple[Rule, ...]:
    up, down = (Param(f"{EXPERT}.w3.weight", "ffn hidden"), Param(f"{EXPERT}.w2.weight", "hidden ffn"))
    gated = GatedMlp(f"{EXPERT_FC1}.weight", (Param(f"{EXPERT}.w1.weight", "ffn hidden"), up))
    return PerExpert.of(gated, count), PerExpert.of(Copy(f"{EXPERT_FC2}.weight", (down,)), count)


def _table(config: dict[str, Any]) -> Table:
    return llama.weights_table(
        config,
        (
            *llama.ATTENTION_AND_ENDS,
            *norm(EXPERTS_NORM, "model.layers.{layer}.post_attention_layernorm", bias=False),
            *linear(ROUTER, f"{BLOCK}.gate", "experts hidden", bias=False),
            *_experts(config["num_moe_experts"]),
        ),
    )


def _to_nemo(hf: dict[str, Any]) -> dict[str, Any]:
    chosen, experts = hf["num_experts_per_tok"], hf["num_local_experts"]
    if not 2 <= chosen <= experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok={chosen} of num_local_experts={experts} is not supported, only 2 or more"
        )
    return window_to_nemo(hf)


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    models="Mixtral 8x7B, 8x22B",
    keys=KEYS,
    constants={
        **llama.CONSTANTS,
        **NO_BIASES,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_pre_softmax": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
    },
    required={"hidden_act": ("silu",), "router_jitter_noise": (0.0,)},
    table=_table,
    defaults={"sliding_window": None},
    extra_nemo=_to_nemo,
    extra_hf=window_to_hf,
    rope=RopeKeys(default_base=1e6),
)
