"""The ``exp_manager`` section: NeMo's experiment manager (log folder, loggers, time limit) and checkpoint policy.

Keys and meanings are those of NeMo's ``ExpManagerConfig``; what this trainer does itself or does not offer is in
:mod:`nemo_dpo.config.legacy`, with the reason.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import II


@dataclass(frozen=True)
class CheckpointCallbackParams:
    """Which checkpoints are kept."""

    monitor: str = "val_loss"
    """Figure that ranks checkpoints: val_ and a figure of docs/runs.md, or step."""
    mode: str = "min"
    """min or max: whether a small or a large metric is better."""
    save_top_k: int = 3
    """Best checkpoints kept beside the newest, from which a run resumes; -1 keeps all, 0 none."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on (docs/checkpoints.md)."""
    always_save_nemo: bool = False
    """Write the .nemo at every save, not only at the end."""
    save_nemo_on_train_end: bool = True
    """Write the trained .nemo when training ends."""
    filename: str = "megatron_gpt--{${.monitor}:.3f}-{step}-{consumed_samples}-{epoch}"
    """Names of checkpoint folders; only for people: nothing is read from a name."""
    model_parallel_size: int | None = None
    """Tensor × pipeline parallel size, as NeMo's yaml computes it; if given it must be that product."""


@dataclass(frozen=True)
class ExpManagerConfig:
    """Experiment folder, loggers, resuming and checkpoints of a run."""

    explicit_log_dir: str | None = "results"
    """Folder of this run: logs, checkpoints, data cache. A second start with the same folder resumes."""
    exp_dir: str | None = None
    """NeMo's other way to name the folder, <exp_dir>/<name>/<version>; needs explicit_log_dir=null."""
    name: str = "megatron_gpt"
    """Name of the experiment, and of the exported .nemo."""
    version: str | None = None
    """Version folder under <exp_dir>/<name>; null is the date, or version_N when use_datetime_version=false."""
    use_datetime_version: bool = True
    """Name the version folder by date and time."""
    max_time_per_run: str | None = II("trainer.max_time")
    """Wall-clock limit DD:HH:MM:SS, after which the run saves and ends; follows trainer.max_time."""
    resume_if_exists: bool = True
    """Resume from the checkpoint that was saved last in the log folder; false refuses a folder that holds any."""
    resume_ignore_no_checkpoint: bool = True
    """Start afresh when there is none to resume from; false makes that an error."""
    resume_from_checkpoint: str | None = None
    """Resume from this checkpoint folder instead of the newest."""
    create_checkpoint_callback: bool = True
    """Save checkpoints at all."""
    checkpoint_callback_params: CheckpointCallbackParams = field(default_factory=CheckpointCallbackParams)
    """Which checkpoints are kept."""
    create_tensorboard_logger: bool = True
    """Log to TensorBoard files in the log folder."""
    summary_writer_kwargs: dict[str, Any] | None = None
    """Passed to TensorBoard's SummaryWriter as they are."""
    create_wandb_logger: bool = False
    """Log to Weights & Biases; WANDB_MODE=offline works."""
    wandb_logger_kwargs: dict[str, Any] | None = field(
        default_factory=lambda: {"project": "nemo_aligner_dpo", "name": "rlhf_gpt3_dpo"}
    )
    """Passed to Lightning's WandbLogger as they are (project, name, …)."""
    create_mlflow_logger: bool = False
    """Log to MLflow."""
    mlflow_logger_kwargs: dict[str, Any] | None = None
    """experiment_name, tracking_uri … of MLflow; exp_manager checks them."""
    create_dllogger_logger: bool = False
    """Log by DLLogger."""
    dllogger_logger_kwargs: dict[str, Any] | None = None
    """verbose, stdout, json_file of DLLogger; exp_manager checks them."""
    create_clearml_logger: bool = False
    """Log to ClearML."""
    clearml_logger_kwargs: dict[str, Any] | None = None
    """project, task … of ClearML; exp_manager checks them."""
    create_neptune_logger: bool = False
    """Log to Neptune."""
    neptune_logger_kwargs: dict[str, Any] | None = None
    """Passed to Lightning's NeptuneLogger as they are."""
    files_to_copy: list[str] | None = None
    """Files that exp_manager copies into the log folder."""
    hf_export_on_train_end: bool = False
    """Write a Hugging Face folder, with LoRA one of PEFT, beside the trained .nemo. Not a key of NeMo."""
    plot_on_train_end: bool = True
    """Draw loss, accuracy, rewards and margins as a PNG in the log folder. Not a key of NeMo."""


OWN_KEYS = ("hf_export_on_train_end", "plot_on_train_end")
"""Keys of this section that NeMo's exp_manager does not have."""


LOGGER_KEYS = ("name", "summary_writer_kwargs", "files_to_copy")
"""Keys for the loggers that do not say so in their name."""


def nemo_options(config: ExpManagerConfig) -> dict[str, Any]:
    """The arguments of ``nemo.utils.exp_manager.exp_manager``: the loggers are its, all else is this trainer's own."""
    loggers = {key: value for key, value in asdict(config).items() if "logger" in key or key in LOGGER_KEYS}
    return loggers | {
        "resume_if_exists": False,
        "create_checkpoint_callback": False,
        "create_preemption_callback": False,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        "seconds_to_sleep": 0,
    }
