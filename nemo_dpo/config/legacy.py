"""Keys of NeMo-Aligner, NeMo and the checkpoint's ``model_config.yaml`` that are not fields of the schema.

One table, key → rule, so that a configuration written for NeMo-Aligner runs, or says why it cannot: nothing is read
and ignored in silence. A rule holds for its key and for all keys below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Refused:
    """The key asks for something this trainer does not do; ``allowed`` values do not ask for it."""

    reason: str
    allowed: tuple[object, ...] = (None,)


@dataclass(frozen=True)
class Mapped:
    """The key needs no counterpart; one line says so, except at the ``silent`` values."""

    notice: str
    silent: tuple[object, ...] = (None,)


@dataclass(frozen=True)
class Renamed:
    """The value belongs to the key ``to``."""

    to: str


@dataclass(frozen=True)
class Mirror:
    """NeMo-Aligner repeats the key ``of`` here; another value is refused."""

    of: str


Rule = Refused | Mapped | Renamed | Mirror

OFF = (None, False)

_LIGHTNING = "Lightning's loop, loggers and checkpoints are set up by the trainer itself"
_PEFT_UNUSED = "not used: model.peft.peft_scheme is none or lora"
_TYING = "adapters are not tied between layers: each layer's update is its own, as in the files of PEFT"
_SHARDED = "FSDP and ZeRO are not offered; use tensor and pipeline parallelism and optim.name=mcore_distributed_optim"
_APEX = "Apex's optimizer only; megatron-core's chooses its own buffers"
_OVERLAP = "changes speed only; megatron-core's optimizer communicates after the last micro-batch"
_FUSION = "fused kernels are used where what is installed has them"
_FP8 = "fp8 training is not offered"
_FP8_UNUSED = "not used without fp8"
_UB = "Transformer Engine's overlap of communication is not offered"
_UB_UNUSED = "not used without model.ub_tp_comm_overlap"
_NEMO_RUNTIME = "set by the trainer itself"
_DIST_CKPT = "checkpoints are written and read in parallel in torch_dist format, on the CPU"
_EXPERTS = "each expert has matrices of its own, which its tensor parallel ranks share"
_DISPATCH = "tokens are sent to their experts by all-to-all"
_CALLBACK = "the callback is not offered"
_CALLBACK_UNUSED = "not used without its callback"
_TIMING = "step times, throughput and memory are always logged"
_SAVE_RHYTHM = "trainer.dpo.save_interval says when checkpoints are written"
_MASKS = "each response is a sequence of its own, masked by length and never by token id"

_TRAINER: dict[str, Rule] = {
    "trainer.logger": Refused(_LIGHTNING, OFF),
    "trainer.enable_checkpointing": Refused(_LIGHTNING, OFF),
    "trainer.use_distributed_sampler": Refused(_LIGHTNING, OFF),
    "trainer.replace_sampler_ddp": Refused(_LIGHTNING, OFF),
    "trainer.benchmark": Refused(_LIGHTNING, OFF),
    "trainer.enable_model_summary": Refused(_LIGHTNING, OFF),
    "trainer.accumulate_grad_batches": Refused("model.global_batch_size sets the accumulation", (None, 1)),
    "trainer.strategy": Refused(_SHARDED, (None, "auto")),
    "trainer.max_epochs": Mirror("trainer.dpo.max_epochs"),
    "trainer.max_steps": Mirror("trainer.dpo.max_steps"),
    "trainer.val_check_interval": Mirror("trainer.dpo.val_check_interval"),
    "trainer.limit_train_batches": Mirror("trainer.dpo.limit_train_batches"),
    "trainer.limit_val_batches": Mirror("trainer.dpo.limit_val_batches"),
    "trainer.gradient_clip_val": Mirror("trainer.dpo.gradient_clip_val"),
    "precision": Mirror("trainer.precision"),
    "model.precision": Mirror("trainer.precision"),
}

_CHECKPOINT_CALLBACK: dict[str, Rule] = {
    "filepath": Refused("checkpoints are in the log folder"),
    "dirpath": Refused("checkpoints are in the log folder"),
    "prefix": Refused("checkpoint_callback_params.filename names checkpoints"),
    "postfix": Refused("the export ends in .nemo", (None, ".nemo")),
    "verbose": Mapped("each save is logged", (None, True)),
    "auto_insert_metric_name": Refused("the metric's name is part of the file name", (None, True)),
    "every_n_epochs": Refused(_SAVE_RHYTHM, (None, 1)),
    "every_n_train_steps": Refused(_SAVE_RHYTHM),
    "train_time_interval": Refused(_SAVE_RHYTHM),
    "save_on_train_epoch_end": Refused(_SAVE_RHYTHM, OFF),
    "save_last": Refused("the newest checkpoint is what a run resumes from and is always kept", (None, True)),
    "save_weights_only": Refused("a checkpoint holds all that resuming needs", OFF),
    "save_best_model": Refused("the best checkpoints are kept by save_top_k", OFF),
    "save_last_n_optim_states": Refused("every checkpoint holds the optimizer's state", (None, -1)),
}

_EXP_MANAGER: dict[str, Rule] = {
    **{f"checkpoint_callback_params.{key}": rule for key, rule in _CHECKPOINT_CALLBACK.items()},
    "create_early_stopping_callback": Refused(_CALLBACK, OFF),
    "early_stopping_callback_params": Mapped(_CALLBACK_UNUSED),
    "create_ipl_epoch_stopper_callback": Refused(_CALLBACK, OFF),
    "ipl_epoch_stopper_callback_params": Mapped(_CALLBACK_UNUSED),
    "create_straggler_detection_callback": Refused(_CALLBACK, OFF),
    "straggler_detection_params": Mapped(_CALLBACK_UNUSED),
    "create_fault_tolerance_callback": Refused(_CALLBACK, OFF),
    "fault_tolerance": Mapped(_CALLBACK_UNUSED),
    "ema.enable": Refused("averaging of weights is not offered", OFF),
    "ema": Mapped(_CALLBACK_UNUSED),
    "create_preemption_callback": Mapped("a termination signal always saves and ends the run, on every rank"),
    "log_step_timing": Mapped(_TIMING),
    "log_delta_step_timing": Mapped(_TIMING),
    "step_timing_kwargs": Mapped(_TIMING),
    "log_tflops_per_sec_per_gpu": Mapped(_TIMING),
    "resume_past_end": Mapped("a finished run goes on when trainer.dpo.max_epochs or max_steps is raised", OFF),
    "disable_validation_on_resume": Mapped("a resumed run validates when its rhythm says so"),
    "seconds_to_sleep": Mapped("ranks wait for each other, not for a time"),
}

_PARALLEL: dict[str, Rule] = {
    "ffn_dropout": Refused("megatron-core has no dropout inside the MLP", (None, 0, 0.0)),
    "context_parallel_size": Refused("context parallelism is not offered", (None, 1)),
    "expert_tensor_parallel_size": Refused(_EXPERTS, (None,)),
    "pipeline_model_parallel_split_rank": Refused("there are no encoder-decoder models", (None, 0)),
    "rampup_batch_size": Refused("the global batch size is constant"),
    "fsdp": Refused(_SHARDED, OFF),
    "use_fsdp2": Refused(_SHARDED, OFF),
    "use_torch_fsdp2": Refused(_SHARDED, OFF),
    "use_custom_fsdp": Refused(_SHARDED, OFF),
    "use_megatron_fsdp": Refused(_SHARDED, OFF),
    "data_parallel_sharding_strategy": Refused(_SHARDED, (None, "no_shard")),
    "zero_stage": Refused(_SHARDED, (None, 0)),
    "fsdp_sharding_strategy": Mapped("not used without model.fsdp", (None, "full")),
    "fsdp_grad_reduce_dtype": Mapped("not used without model.fsdp", (None, "fp32")),
    "fsdp_sharded_checkpoint": Mapped("not used without model.fsdp", OFF),
    "fsdp_use_orig_params": Mapped("not used without model.fsdp", OFF),
    "cpu_offloading": Refused("offloading of activations is not offered", OFF),
    "defer_embedding_wgrad_compute": Refused("it is not offered", OFF),
    "wgrad_deferral_limit": Mapped("not used without model.defer_embedding_wgrad_compute", (None, 0, -1)),
    "num_micro_batches_with_partial_activation_checkpoints": Refused("recompute is the same in all micro-batches"),
    "activations_checkpoint_layers_per_pipeline": Refused("recompute is the same in all pipeline stages"),
    "overlap_p2p_comm": Mapped(_OVERLAP, OFF),
    "batch_p2p_comm": Mapped(_OVERLAP),
    "sync_batch_comm": Mapped(_OVERLAP, OFF),
    "nccl_communicator_config_path": Refused("NCCL is configured by its environment variables"),
    "ub_tp_comm_overlap": Refused(_UB, OFF),
    "ub_tp_comm_overlap_cfg": Mapped(_UB_UNUSED),
    **{f"tp_comm_{key}": Refused(_UB, OFF) for key in ("atomic_ag", "atomic_rs", "bulk_dgrad", "bulk_wgrad")},
    **{f"tp_comm_{key}": Refused(_UB, OFF) for key in ("overlap_ag", "overlap_rs", "overlap_rs_dgrad", "split_ag")},
    "moe_grouped_gemm": Refused(_EXPERTS, OFF),
    "moe_token_dispatcher_type": Mapped(_DISPATCH, (None, "alltoall")),
}

_NUMERICS: dict[str, Rule] = {
    "mcore_gpt": Refused(
        "only megatron-core models are trained; convert the checkpoint with tools/convert/convert_nemo_gpt_to_mcore.py",
        (None, True),
    ),
    "megatron_amp_O2": Mapped("trainer.precision decides: bf16 always keeps fp32 master weights in the optimizer"),
    "native_amp_init_scale": Mapped("fp16 only"),
    "native_amp_growth_interval": Mapped("fp16 only"),
    "hysteresis": Mapped("fp16 only"),
    "fp16_lm_cross_entropy": Refused("log-probs are computed in fp32", OFF),
    "fp32_residual_connection": Refused("the residual stream has the model's precision", OFF),
    "fp8": Refused(_FP8, OFF),
    "fp8_e4m3": Refused(_FP8, OFF),
    "fp8_hybrid": Refused(_FP8, OFF),
    "fp8_params": Refused(_FP8, OFF),
    "fp8_margin": Mapped(_FP8_UNUSED, (None, 0)),
    "fp8_interval": Mapped(_FP8_UNUSED, (None, 1)),
    "fp8_amax_history_len": Mapped(_FP8_UNUSED),
    "fp8_amax_compute_algo": Mapped(_FP8_UNUSED),
    "reduce_amax": Mapped(_FP8_UNUSED),
    "use_emha": Mapped(_FP8_UNUSED, OFF),
    "bias_gelu_fusion": Renamed("model.bias_activation_fusion"),
    "bias_dropout_add_fusion": Mapped(_FUSION),
    "masked_softmax_fusion": Mapped(_FUSION),
    "get_attention_mask_from_fusion": Mapped(_FUSION),
    "apply_rope_fusion": Mapped(_FUSION),
    "gradient_accumulation_fusion": Mapped(_FUSION),
    "grad_div_ar_fusion": Mapped(_FUSION),
    "persist_layer_norm": Mapped(_FUSION),
    "use_flash_attention": Mapped("the attention kernel is chosen by what is installed and by NVTE_* variables"),
    "attention_backend": Mapped("the attention kernel is chosen by what is installed and by NVTE_* variables"),
    "grad_allreduce_chunk_size_mb": Mapped(_APEX),
    "gradient_as_bucket_view": Mapped(_APEX),
    "do_layer_norm_weight_decay": Refused("norms and biases are not decayed", OFF),
    "init_method_std": Mapped("weights come from the checkpoint"),
    "use_scaled_init_method": Mapped("weights come from the checkpoint"),
    "use_cpu_initialization": Mapped("weights come from the checkpoint"),
}

_NEMO: dict[str, Rule] = {
    "target": Mapped("the model is megatron-core's GPTModel"),
    "nemo_version": Mapped("any version's archive is read"),
    "pre_process": Mapped(_NEMO_RUNTIME),
    "post_process": Mapped(_NEMO_RUNTIME),
    "onnx_safe": Mapped(_NEMO_RUNTIME),
    "apex_transformer_log_level": Mapped(_NEMO_RUNTIME),
    "gc_interval": Mapped(_NEMO_RUNTIME),
    "nsys_profile.enabled": Refused("profile from outside, with nsys or py-spy", OFF),
    "nsys_profile": Mapped("not used without nsys_profile.enabled"),
    "mcore_customization_config": Refused("a model's architecture is read from its checkpoint"),
    "name": Refused("only the GPT of megatron-core's default layers is built", (None, "", "te_gpt", "megatron_gpt")),
    "resume_from_checkpoint": Refused("set exp_manager.resume_from_checkpoint"),
    "dist_ckpt_format": Refused("checkpoints are written in torch_dist format", (None, "torch_dist")),
    "dist_ckpt_load_strictness": Mapped("weights are matched by name: a missing or unexpected one is always an error"),
    "dist_ckpt_load_on_device": Mapped(_DIST_CKPT),
    "dist_ckpt_parallel_save": Mapped(_DIST_CKPT),
    "dist_ckpt_parallel_save_within_dp": Mapped(_DIST_CKPT),
    "dist_ckpt_parallel_load": Mapped(_DIST_CKPT),
    "dist_ckpt_parallel_dist_opt": Mapped(_DIST_CKPT),
    "dist_ckpt_torch_dist_multiproc": Mapped(_DIST_CKPT),
    "dist_ckpt_assume_constant_structure": Mapped(_DIST_CKPT),
    "overwrite_base_config": Mapped("the data and optimizer sections of a checkpoint are never used"),
    "answer_only_loss": Mapped("only response tokens ever count", (None, True)),
}

_PEFT: dict[str, Rule] = {
    "restore_from_ckpt": Refused("NeMo-Aligner never read it either; an adapter is restored by restore_from_path"),
    "lora_tuning.weight_tying": Refused(_TYING, OFF),
    "lora_tuning.position_embedding_strategy": Refused(_TYING),
    "lora_tuning.a2a_experimental": Mapped("adapters communicate their inner dimension only", OFF),
    **{f"{other}_tuning": Mapped(_PEFT_UNUSED) for other in ("adapter", "ia3", "p", "selective")},
}

_OPTIM: dict[str, Rule] = {
    "bucket_cap_mb": Mapped(_APEX),
    "contiguous_grad_buffer": Mapped(_APEX),
    "contiguous_param_buffer": Mapped(_APEX),
    "overlap_grad_sync": Mapped(_OVERLAP, OFF),
    "overlap_param_sync": Mapped(_OVERLAP, OFF),
    "align_param_gather": Mapped(_OVERLAP, OFF),
    "grad_sync_dtype": Refused("gradients are reduced in fp32", (None, "fp32", 32, "32")),
    "dtype": Refused("the optimizer's state is fp32", (None, "fp32", "float32")),
    "capturable": Mapped(_APEX),
    "master_weights": Mapped("bf16 always keeps fp32 master weights", (None, True)),
    "sched.max_steps": Refused("the schedule is as long as the run: trainer.dpo.max_steps or trainer.dpo.max_epochs"),
    "sched.constant_ratio": Refused("set model.optim.sched.constant_steps"),
    "sched.monitor": Mapped("the schedule depends on the step alone"),
    "sched.reduce_on_plateau": Refused("the schedule depends on the step alone", OFF),
    "sched.last_epoch": Refused("the schedule resumes with the checkpoint", (None, -1)),
}

_DATA: dict[str, Rule] = {
    "data_impl": Refused("data are jsonl files, indexed and tokenised once", (None, "jsonl", "json")),
    "index_mapping_dir": Renamed("model.data.cache_dir"),
    "chat_prompt_tokens": Refused("rows of messages are not read yet; write the template into prompt and responses"),
    "skip_warmup": Mapped("the tokenised data are memory-mapped"),
    "num_workers": Mapped("batches are made from memory-mapped tokens, without workers", (None, 0)),
    "dataloader_type": Mapped("model.data.shuffle sets the order"),
    "reset_position_ids": Refused(_MASKS, OFF),
    "reset_attention_mask": Refused(_MASKS, OFF),
    "eod_mask_loss": Refused(_MASKS, OFF),
    "validation_drop_last": Mapped("validation covers all pairs, the last incomplete batch included"),
    "no_seqlen_plus_one_input_tokens": Mapped(_MASKS, OFF),
    "pad_samples_to_global_batch_size": Mapped("no pair is repeated to fill a batch", OFF),
    "shuffle_documents": Mapped("model.data.shuffle sets the order"),
    "exchange_indices_distributed": Mapped("one rank indexes the data", OFF),
    "mock_dataset": Refused("there is no made-up data", OFF),
}


def _under(section: str, rules: dict[str, Rule]) -> dict[str, Rule]:
    return {f"{section}.{key}": rule for key, rule in rules.items()}


RULES: dict[str, Rule] = {
    **_TRAINER,
    **_under("exp_manager", _EXP_MANAGER),
    **_under("model", _PARALLEL | _NUMERICS | _NEMO),
    **_under("model.peft", _PEFT),
    **_under("model.optim", _OPTIM),
    **_under("model.data", _DATA),
    "model.dpo.average_log_probs": Renamed("model.dpo.preference_average_log_probs"),
}

#: key → value of NeMo → (value here, notice), for keys that are fields of the schema.
VALUES: dict[str, dict[object, tuple[object, str]]] = {
    "model.optim.name": {
        "distributed_fused_adam": (
            "mcore_distributed_optim",
            "Apex's optimizer becomes megatron-core's distributed one",
        ),
        "fused_adam": ("adam", "a fused kernel is used where there is one"),
        "adamw": ("adam", "adam's weight decay is decoupled, as in AdamW"),
    },
    "trainer.devices": {-1: ("auto", "all devices of the host")},
    "trainer.accelerator": {"cuda": ("gpu", "the same thing")},
}


def rule_for(key: str) -> tuple[str, Rule | None]:
    """The rule of ``key`` or of its nearest ancestor that has one, after the key that the table has."""
    while key and key not in RULES:
        key = key.rpartition(".")[0]
    return key, RULES.get(key)


def grouped(notices: Iterable[tuple[str, str]]) -> list[str]:
    """One line per notice, with all ``(key, notice)`` keys that share it."""
    keys: dict[str, dict[str, None]] = {}
    for key, notice in notices:
        keys.setdefault(notice, {})[key] = None
    return [f"{', '.join(names)}: {notice}" for notice, names in keys.items()]
