"""The LightningModule: one batch is one optimizer step."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from nemo_dpo.config.schema import OptimConfig
from nemo_dpo.data.batch import GlobalBatch, MicroBatch
from nemo_dpo.losses import Objective
from nemo_dpo.metrics.preference import NUM_SUMS, SUMS, finalize
from nemo_dpo.parallel.engine import Engine, ForwardStep
from nemo_dpo.parallel.watch import Watch
from nemo_dpo.reference.frozen import Reference
from nemo_dpo.training.data import Batches
from nemo_dpo.training.leave import Stop, Stopped
from nemo_dpo.training.lr import build_scheduler
from nemo_dpo.training.nonfinite import NonFinite
from nemo_dpo.training.step import objective_step
from nemo_dpo.training.strategy import OptimizerHandle

Metrics = dict[str, float]


class PreferenceModule(LightningModule):
    """Drives `Engine` from Lightning's loop.

    Args:
        requested: what asks any of the ranks to stop; collective.

    Attributes:
        metrics: the last step's metrics, without prefix; equal on all ranks.
        watch: over what this rank does.
    """

    def __init__(
        self,
        engine: Engine,
        reference: Reference,
        objective: Objective,
        optim: OptimConfig,
        *,
        clip_grad: float,
        nonfinite: NonFinite,
        watch: Watch,
        requested: Callable[[], Stop | None],
        first_step: int,
        max_steps: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Past nn.Module's registration: Lightning must neither move, count nor save megatron-core's parameters.
        object.__setattr__(self, "engine", engine)
        self._reference = reference
        self._objective = objective
        self._optim = optim
        self._clip_grad = clip_grad
        self._nonfinite = nonfinite
        self.watch = watch
        self._requested = requested
        self._first_step = first_step
        self._max_steps = max_steps
        self.metrics: Metrics = {}
        self.progress: Callable[[], dict[str, Any]] = dict

    def configure_optimizers(self) -> dict[str, Any]:
        """megatron-core's optimizer behind a handle, and the schedule that steers it."""
        handle = OptimizerHandle(self.engine, self._clip_grad)
        scheduler = build_scheduler(handle, self._optim, self._first_step, self._max_steps)
        return {"optimizer": handle, "lr_scheduler": scheduler}

    def transfer_batch_to_device(self, batch: GlobalBatch, device: torch.device, dataloader_idx: int) -> GlobalBatch:
        """To the device of the model, which Lightning does not know."""
        return batch.to(self.engine.groups.device, non_blocking=True)

    def training_step(self, batch: GlobalBatch, batch_idx: int) -> None:
        """Reference pass, forward and backward, update, schedule; leaves `metrics`.

        Raises:
            NonFiniteError: loss or gradient norm is NaN or infinite, and the run is to stop (see `NonFinite`).
        """
        with self.watch.over(f"step {self.trainer.global_step}"):
            self._train(batch, self.trainer.global_step)

    def _train(self, batch: GlobalBatch, step: int) -> None:
        start = time.perf_counter()
        handle, scheduler = self.optimizers().optimizer, self.lr_schedulers()
        rate = handle.param_groups[0]["lr"]
        references = self._reference.logps(batch)
        outcomes = self.engine.forward_backward(batch.micro_batches, self._step(references))
        metrics, pairs, tokens = self._reduce([outcome.sums for outcome in outcomes], batch)
        self.optimizers().step(wanted=math.isfinite(metrics["loss"]))
        figures = {"loss": metrics["loss"], "grad_norm": handle.grad_norm}
        self._nonfinite.judge(step, figures, batch, outcomes, references)
        scheduler.step()
        seconds = time.perf_counter() - start
        self.metrics = {
            **metrics,
            **self.engine.load_balance(),
            **self._nonfinite.figures,
            "grad_norm": handle.grad_norm,
            "lr": rate,
            "step_time": seconds,
            "pairs_per_second": pairs / seconds,
            "tokens_per_second": tokens / seconds,
            "memory_gib": self._peak_memory(),
        }

    def evaluate(self, batches: Batches, references: list[list[Tensor]]) -> Metrics:
        """Metrics over all `batches`; the reference's log-probs are computed unless `references` holds them already.

        Raises:
            Stopped: asked to, before the last batch; `references` keeps what it has got.
        """
        with self.watch.over(f"the evaluation of {batches.split}"):
            return self._evaluate(batches, references)

    def _evaluate(self, batches: Batches, references: list[list[Tensor]]) -> Metrics:
        sums: list[Tensor] = []
        for number in range(len(batches)):
            self.watch.mark()
            if stop := self._requested():
                raise Stopped(stop, f"in the evaluation of {batches.split}")
            on_device = batches[number].to(self.engine.groups.device)
            if number == len(references):
                references.append(self._reference.logps(on_device))
            step = self._step(references[number])
            sums += [outcome.sums for outcome in self.engine.forward_only(on_device.micro_batches, step)]
        return self._reduce(sums)[0]

    def _step(self, references: list[Tensor]) -> ForwardStep:
        """The objective's forward step; each micro-batch is progress."""
        step = objective_step(self._objective, references)

        def marked(iterator: Iterator[MicroBatch], chunk: nn.Module) -> Any:
            self.watch.mark()
            return step(iterator, chunk)

        return marked

    def _reduce(self, sums: list[Tensor], batch: GlobalBatch | None = None) -> tuple[Metrics, float, float]:
        """Metrics, pairs and unpadded tokens over all ranks, from the sums that the last stage collected."""
        groups = self.engine.groups
        total = torch.zeros(NUM_SUMS + 1, dtype=torch.float64, device=groups.device)
        if sums:
            total[:-1] = torch.stack(sums).sum(0)
        if batch:
            total[-1] = sum(micro_batch.tokens_real for micro_batch in batch)
        dist.all_reduce(total, group=groups.dp)
        groups.broadcast_from_last_stage(total)
        return finalize(total[:-1]), total[SUMS.index("pairs")].item(), total[-1].item()

    def _peak_memory(self) -> float:
        """GiB at most so far: of the device, or resident of this process on a CPU host."""
        if self.engine.groups.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Numbers that say where the run is; the strategy takes them out again."""
        checkpoint["progress"] = {**self.progress(), **self._nonfinite.state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on from there."""
        self._nonfinite.restore(checkpoint["progress"])
