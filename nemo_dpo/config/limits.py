"""What single values may be: choices and ranges by key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from nemo_dpo.config.schema import Config


@dataclass(frozen=True)
class Limit:
    """A test of a value that is not null, and the words for what passes it."""

    text: str
    passes: Callable[[Any], bool]


def choice(*values: str) -> Limit:
    """One of ``values``."""
    return Limit(f"must be {' or '.join(values)}", lambda value: value in values)


POSITIVE = Limit("must be greater than 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Limit("must be 0 or greater", lambda value: 0 <= value < math.inf)
FRACTION = Limit("must be at least 0 and less than 1", lambda value: 0 <= value < 1)
COUNT = Limit("must be an integer of at least 1", lambda value: value >= 1)
STEPS_OR_FRACTION = Limit(
    "must be an integer of at least 1 (steps) or a float in (0, 1] (fraction)",
    lambda value: value >= 1 if isinstance(value, int) else 0 < value <= 1,
)
DURATION = Limit("must be DD:HH:MM:SS", lambda value: re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", value) is not None)

LORA_TARGETS = ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2", "attention", "mlp", "all")

LIMITS: dict[str, Limit] = {
    "trainer.num_nodes": COUNT,
    "trainer.devices": Limit(
        "must be auto or an integer of at least 1",
        lambda value: value >= 1 if isinstance(value, int) else value == "auto",
    ),
    "trainer.accelerator": choice("auto", "cpu", "gpu"),
    "trainer.precision": choice("bf16", "bf16-mixed", "32", "32-true", "fp32"),
    "trainer.max_time": DURATION,
    "trainer.distributed_timeout_minutes": POSITIVE,
    "trainer.log_every_n_steps": COUNT,
    "trainer.dpo.max_epochs": COUNT,
    "trainer.dpo.max_steps": Limit("must be -1 or at least 1", lambda value: value == -1 or value >= 1),
    "trainer.dpo.val_check_interval": STEPS_OR_FRACTION,
    "trainer.dpo.save_interval": COUNT,
    "trainer.dpo.limit_train_batches": STEPS_OR_FRACTION,
    "trainer.dpo.limit_val_batches": STEPS_OR_FRACTION,
    "trainer.dpo.gradient_clip_val": NOT_NEGATIVE,
    "trainer.dpo.on_nonfinite": choice("stop", "skip"),
    "trainer.dpo.max_consecutive_skips": COUNT,
    "exp_manager.max_time_per_run": DURATION,
    "exp_manager.checkpoint_callback_params.mode": choice("min", "max"),
    "exp_manager.checkpoint_callback_params.save_top_k": Limit("must be -1 or greater", lambda value: value >= -1),
    "model.micro_batch_size": COUNT,
    "model.global_batch_size": COUNT,
    "model.tensor_model_parallel_size": COUNT,
    "model.pipeline_model_parallel_size": COUNT,
    "model.virtual_pipeline_model_parallel_size": COUNT,
    "model.expert_model_parallel_size": COUNT,
    "model.moe_router_load_balancing_type": choice("aux_loss", "seq_aux_loss", "none"),
    "model.moe_aux_loss_coeff": NOT_NEGATIVE,
    "model.activations_checkpoint_granularity": choice("none", "full", "selective"),
    "model.activations_checkpoint_method": choice("uniform", "block"),
    "model.activations_checkpoint_num_layers": COUNT,
    "model.hidden_dropout": FRACTION,
    "model.attention_dropout": FRACTION,
    "model.seed": NOT_NEGATIVE,
    "model.encoder_seq_length": COUNT,
    "model.dpo.ref_policy_kl_penalty": POSITIVE,
    "model.dpo.preference_loss": choice("dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"),
    "model.dpo.preference_loss_weight": NOT_NEGATIVE,
    "model.dpo.sft_loss_weight": NOT_NEGATIVE,
    "model.dpo.gt_reward_scale": POSITIVE,
    "model.dpo.log_prob_forward_micro_batch_size": COUNT,
    "model.dpo.reference.kind": Limit(
        "must be frozen, adapter_off, adapter:<name>, cached or cached:<one of these>",
        lambda value: re.fullmatch(r"(cached:)?(frozen|adapter_off|adapter:\w+)|cached", value) is not None,
    ),
    "model.peft.peft_scheme": choice("none", "lora"),
    "model.peft.base_quantization": choice("nf4"),
    "model.peft.frozen_adapters": Limit(
        "must map names of letters, digits and _, but policy, to adapter files",
        lambda value: all(re.fullmatch(r"(?!policy$)\w+", name) for name in value),
    ),
    "model.peft.lora_tuning.target_modules": Limit(
        f"must be a list of {', '.join(LORA_TARGETS)}",
        lambda value: value and all(target in LORA_TARGETS for target in value),
    ),
    "model.peft.lora_tuning.adapter_dim": COUNT,
    "model.peft.lora_tuning.alpha": POSITIVE,
    "model.peft.lora_tuning.variant": choice("nemo", "canonical"),
    "model.peft.lora_tuning.layer_selection": Limit(
        "must be a list of layer numbers from 1, each once",
        lambda value: value and min(value) >= 1 and len(set(value)) == len(value),
    ),
    "model.peft.lora_tuning.adapter_dropout": FRACTION,
    "model.peft.lora_tuning.dropout_position": choice("pre", "post"),
    "model.peft.lora_tuning.column_init_method": choice("xavier", "kaiming", "normal", "zero"),
    "model.peft.lora_tuning.row_init_method": choice("zero", "xavier", "kaiming", "normal"),
    "model.optim.name": choice("mcore_distributed_optim", "adam", "sgd"),
    "model.optim.lr": POSITIVE,
    "model.optim.weight_decay": NOT_NEGATIVE,
    "model.optim.betas": Limit(
        "must be two numbers of at least 0 and less than 1",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    ),
    "model.optim.eps": POSITIVE,
    "model.optim.momentum": FRACTION,
    "model.optim.sched.name": choice("CosineAnnealing", "linear", "constant"),
    "model.optim.sched.warmup_steps": NOT_NEGATIVE,
    "model.optim.sched.warmup_ratio": FRACTION,
    "model.optim.sched.constant_steps": NOT_NEGATIVE,
    "model.optim.sched.min_lr": NOT_NEGATIVE,
    "model.data.seq_length": Limit("must be at least 2", lambda value: value >= 2),
    "model.data.overlong": choice("drop", "truncate_prompt", "truncate_response", "error"),
    "model.data.invalid": choice("skip", "error"),
    "model.data.default_chosen_reward": Limit("must be finite", math.isfinite),
    "model.data.default_rejected_reward": Limit("must be finite", math.isfinite),
    "model.data.pad_length_to_multiple_of": COUNT,
}


def beyond_limits(cfg: Config) -> Iterator[str]:
    """One line per value of ``cfg`` that is not what it may be."""
    for key, limit in LIMITS.items():
        value = attrgetter(key)(cfg)
        if value is not None and not limit.passes(value):
            yield f"{key}={value!r} {limit.text}"
