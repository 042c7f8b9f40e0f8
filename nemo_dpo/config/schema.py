"""The configuration: every key, its type, its meaning and its only default.

The tree of dataclasses has the sections and names of NeMo-Aligner's ``gpt_dpo.yaml``. The string below a field is its
documentation; :func:`nemo_dpo.config.describe` prints it. ``II("a.b")`` as a default means: follows key ``a.b``.
Allowed values are in :mod:`nemo_dpo.config.limits`, what keys ask of each other in :mod:`nemo_dpo.config.checks`; keys
of NeMo-Aligner that mean nothing here are in :mod:`nemo_dpo.config.legacy`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II

from nemo_dpo.config.architecture import Architecture
from nemo_dpo.config.exp_manager import ExpManagerConfig
from nemo_dpo.config.peft import PeftConfig


@dataclass(frozen=True)
class TrainerDpoConfig:
    """Length of the run and its rhythm, in steps of one global batch."""

    max_epochs: int = 1
    """Passes over the training pairs."""
    max_steps: int = -1
    """Upper limit on optimizer steps; -1 lets max_epochs decide."""
    val_check_interval: int | float = 0.1
    """Validate every so many steps (integer) or fraction of an epoch (float in (0, 1])."""
    save_interval: int = 100
    """Save a checkpoint every so many steps; any combination with val_check_interval is fine."""
    limit_train_batches: int | float = 1.0
    """Global batches per epoch (integer) or fraction of them (float in (0, 1])."""
    limit_val_batches: int | float = 1.0
    """Global batches per validation (integer) or fraction of them (float in (0, 1])."""
    gradient_clip_val: float = 1.0
    """Limit on the gradient's global norm; 0 switches clipping off."""
    on_nonfinite: str = "stop"
    """What a step does whose loss or gradient norm is NaN or infinite: stop (the run), or skip (its update; data and
    schedule move on, the figure skipped_steps counts). Its pairs are written to nonfinite.jsonl in the log folder."""
    max_consecutive_skips: int = 10
    """Steps in a row that on_nonfinite=skip leaves out; one more stops the run."""


@dataclass(frozen=True)
class TrainerConfig:
    """Hardware and length of the run."""

    num_nodes: int = 1
    """Hosts."""
    devices: int | str = "auto"
    """Ranks per host; auto is one process on a CPU host, one rank per GPU elsewhere."""
    accelerator: str = "auto"
    """auto, cpu or gpu; gpu is an error on a host without one."""
    precision: str = "bf16"
    """bf16 (also bf16-mixed): bf16 weights with fp32 master copies; 32 (also 32-true, fp32): all in fp32."""
    max_time: str | None = None
    """Wall-clock limit of one run, DD:HH:MM:SS; the run saves and ends."""
    distributed_timeout_minutes: float = 30.0
    """Longest time without progress in a step, and of a collective, before all ranks write their stacks to stacks/ in
    the log folder and the run ends. Megatron-LM's name."""
    log_every_n_steps: int = 1
    """Steps between two entries of the loggers."""
    dpo: TrainerDpoConfig = field(default_factory=TrainerDpoConfig)
    """Length of the run and its rhythm."""

    @property
    def bf16(self) -> bool:
        """Whether the model computes in bf16 (else fp32)."""
        return self.precision in ("bf16", "bf16-mixed")


@dataclass(frozen=True)
class PretrainedCheckpointConfig:
    """Where training starts."""

    restore_from_path: str | None = None
    """The .nemo file, or the folder it was extracted to, to train from; also the reference. Required."""


@dataclass(frozen=True)
class ReferenceConfig:
    """How the reference policy's log-probs are made."""

    kind: str | None = None
    """frozen: a second copy of what is trained; adapter_off: the same model with the adapter switched off;
    adapter:<name>: with that one of model.peft.frozen_adapters instead; cached, or cached:<one of these>: its log-probs
    computed once, before training, and kept on disk; null is adapter_off with LoRA, frozen without."""
    cache_dir: str | None = None
    """Folder of the log-probs of kind cached, on a file system that all hosts see; null is reference_cache in the log
    folder."""


@dataclass(frozen=True)
class DpoConfig:
    """The preference objective. β = ref_policy_kl_penalty, r = Σ (log π − log π_ref) over a response."""

    ref_policy_kl_penalty: float = 0.2
    """β, the strength of the pull towards the reference."""
    preference_loss: str = "dpo"
    """dpo, ipo, rpo_sq, rpo_bwd_kl or rpo_fwd_kl."""
    preference_loss_weight: float = 1.0
    """Weight of the preference loss."""
    sft_loss_weight: float = 0.0
    """Weight of the chosen response's negative log-likelihood."""
    preference_average_log_probs: bool = False
    """Divide a response's log-probs by its number of tokens in the preference loss."""
    sft_average_log_probs: bool = II(".preference_average_log_probs")
    """The same in the SFT term; follows preference_average_log_probs."""
    gt_reward_scale: float = 1.0
    """η, scale of the ground-truth reward margin in the rpo losses."""
    log_prob_forward_micro_batch_size: int = II("model.micro_batch_size")
    """Pairs per micro-batch of the reference pass; follows model.micro_batch_size."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """How the reference policy's log-probs are made."""


@dataclass(frozen=True)
class SchedConfig:
    """Learning-rate schedule over the steps of the run."""

    name: str = "CosineAnnealing"
    """CosineAnnealing (as NeMo computes it), linear (decay to min_lr) or constant."""
    warmup_steps: int | None = 10
    """Steps of linear warm-up from 0."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps; needs warmup_steps=null."""
    constant_steps: int = 1000
    """Last steps, at min_lr (CosineAnnealing)."""
    min_lr: float = 9e-7
    """Learning rate at the end of the decay."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer."""

    name: str = "mcore_distributed_optim"
    """mcore_distributed_optim (AdamW, state sharded over the data-parallel ranks), adam (AdamW) or sgd."""
    lr: float = 9e-6
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Weight decay, decoupled for AdamW, added to the gradient for sgd; norms and biases are not decayed."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay of Adam's two moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.0
    """Momentum of sgd."""
    sched: SchedConfig = field(default_factory=SchedConfig)
    """Learning-rate schedule."""


@dataclass(frozen=True)
class DataConfig:
    """Preference pairs, jsonl: prompt, chosen_response, rejected_response; optional chosen_reward, rejected_reward."""

    data_prefix: Any = None
    """{train: [files], validation: [files], test: [files]} (test optional), each list with optional weights
    [0.3, a.jsonl, 0.7, b.jsonl]; or one such list together with splits_string. Required."""
    splits_string: str | None = None
    """Shares of train, validation, test, like "98,1,1", when data_prefix is one list."""
    seq_length: int | None = II("model.encoder_seq_length")
    """Longest prompt + response in tokens; follows model.encoder_seq_length, null is the checkpoint's."""
    overlong: str = "drop"
    """What becomes of a longer pair: drop (counted), truncate_prompt (its end is kept), truncate_response or error."""
    invalid: str = "skip"
    """What becomes of a pair that cannot be trained on (prompt not a token prefix, empty or equal responses):
    skip (counted, with file and line) or error."""
    append_eod: bool = False
    """Append the end-of-document token to both responses."""
    apply_ftfy: bool = False
    """Repair broken Unicode with ftfy before tokenising."""
    default_chosen_reward: float = 1.0
    """Ground-truth reward of a chosen response whose line gives none."""
    default_rejected_reward: float = 0.0
    """Ground-truth reward of a rejected response whose line gives none."""
    shuffle: bool = True
    """Shuffle the training pairs anew each epoch, by model.seed."""
    drop_last: bool = False
    """Leave out the last, incomplete global batch of an epoch."""
    pad_length_to_multiple_of: int | None = None
    """Round batch lengths up to a multiple; null rounds as the parallel layout needs."""
    cache_dir: str | None = None
    """Folder of the tokenised data; null is data_cache in the log folder."""


@dataclass(frozen=True)
class ModelConfig(Architecture):
    """Batches, layout over ranks, memory, objective, optimizer and data; the architecture is the checkpoint's."""

    micro_batch_size: int = 1
    """Pairs per forward pass of one rank."""
    global_batch_size: int = 64
    """Pairs per optimizer step, over all ranks."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers per pipeline rank (interleaved schedule); needs PP ≥ 2."""
    sequence_parallel: bool = False
    """Split activations along the sequence between the TP ranks; needs TP ≥ 2."""
    expert_model_parallel_size: int = 1
    """Data-parallel ranks that share the experts of each layer (EP)."""
    moe_router_load_balancing_type: str | None = None
    """The routers' auxiliary loss: aux_loss (of a micro-batch), seq_aux_loss (of a sequence) or none; null is the
    checkpoint's."""
    moe_aux_loss_coeff: float | None = None
    """Weight of the routers' auxiliary loss; null is the checkpoint's, 0 is off."""
    activations_checkpoint_granularity: str | None = None
    """Recompute activations in the backward pass: full or selective; null is the checkpoint's, none is off."""
    activations_checkpoint_method: str | None = None
    """uniform or block, for full recompute."""
    activations_checkpoint_num_layers: int | None = None
    """Layers per recomputed unit (uniform) or recomputed layers per stage (block)."""
    hidden_dropout: float | None = None
    """Dropout after attention and MLP; null is the checkpoint's."""
    attention_dropout: float | None = None
    """Dropout of attention probabilities; null is the checkpoint's."""
    transformer_engine: bool | None = None
    """Use Transformer Engine's layers; null uses them when installed, true demands them."""
    deterministic: bool = False
    """Bitwise repeatable runs: deterministic kernels, at some cost in speed."""
    seed: int = 1234
    """Seed of data order and dropout."""
    encoder_seq_length: int | None = None
    """Longest sequence in tokens; null is the checkpoint's. model.data.seq_length follows it."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    """The preference objective."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    """Adapters beside frozen weights."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    data: DataConfig = field(default_factory=DataConfig)
    """Preference pairs."""

    @property
    def reference_kind(self) -> str:
        """model.dpo.reference.kind, its defaults resolved."""
        usual = "adapter_off" if self.peft.lora else "frozen"
        kind = self.dpo.reference.kind or usual
        return f"cached:{usual}" if kind == "cached" else kind


@dataclass(frozen=True)
class Config:
    """A DPO run."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Hardware and length of the run."""
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    """Experiment folder, loggers, resuming, checkpoints."""
    pretrained_checkpoint: PretrainedCheckpointConfig = field(default_factory=PretrainedCheckpointConfig)
    """Where training starts."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Batches, layout, objective, optimizer, data."""
    allow_unverified: bool = False
    """Allow code paths that have never been run on the hardware they are for."""
