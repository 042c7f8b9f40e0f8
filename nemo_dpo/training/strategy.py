"""Lightning's side of a run whose model, ranks and optimizer belong to megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from nemo_dpo.checkpoint import sharded
from nemo_dpo.checkpoint.writing import Writing
from nemo_dpo.parallel.engine import Engine


class MegatronStrategy(DDPStrategy):
    """Ranks, groups and model exist before the Trainer does; what is left is to keep Lightning's hands off them.

    A subclass of DDPStrategy because Lightning and NeMo ask `isinstance` to learn that a run has several processes.

    Attributes:
        writing: the checkpoint begun last; `CheckpointKeeper` finishes it.
    """

    def __init__(self, engine: Engine, *, background_saves: bool = False, **kwargs: Any) -> None:
        super().__init__(process_group_backend=torch.distributed.get_backend(), **kwargs)
        self._engine = engine
        self._background_saves = background_saves
        self.writing: Writing | None = None

    def setup(self, trainer: Trainer) -> None:
        """No wrapping in torch's DDP, no move to a device."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Micro-batches are inside the batch."""
        return True

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The optimizer must exist before its state can be read."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights go into the checkpoint as sharded tensors, not through Lightning's dictionary."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As the weights."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Begin to write; collective. `checkpoint["progress"]` comes from the module's on_save_checkpoint."""
        progress = checkpoint.pop("progress")
        self.writing = sharded.save(
            Path(filepath), self._engine, checkpoint, progress, background=self._background_saves
        )

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """Collective: restores weights, optimizer and generators, and hands Lightning its own dictionary."""
        trainer_state, progress = sharded.load(Path(checkpoint_path), self._engine)
        for handle in self.optimizers:
            handle.param_groups = self._engine.optimizer.param_groups  # the load has replaced the dictionaries
        # The schedule is built at its step, from the configuration: what it was before must not come back.
        return {**trainer_state, "lr_schedulers": [], "progress": progress}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done by load_checkpoint."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by load_checkpoint."""


class OptimizerHandle(torch.optim.Optimizer):
    """What Lightning counts steps by and schedules steer: a torch optimizer in front of megatron-core's.

    Its parameter groups are megatron-core's own, so a learning rate written here is the one that is used.
    """

    def __init__(self, engine: Engine, clip_grad: float) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(()))], {"lr": 0.0})
        self._engine = engine
        self._clip_grad = clip_grad
        self.param_groups = engine.optimizer.param_groups
        self.grad_norm = 0.0

    def step(self, closure: Any = None, *, wanted: bool = True) -> None:  # type: ignore[override]
        """One update, or none: see `Engine.update`; leaves the gradient norm before clipping in `grad_norm`."""
        self.grad_norm = self._engine.update(self._clip_grad, wanted=wanted)
