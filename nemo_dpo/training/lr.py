"""Learning-rate schedules: NeMo's own CosineAnnealing, and transformers' linear and constant."""

from __future__ import annotations

import logging

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nemo_dpo.config.schema import OptimConfig

logger = logging.getLogger(__name__)


def build_scheduler(optimizer: Optimizer, optim: OptimConfig, first_step: int, max_steps: int) -> LRScheduler:
    """The schedule of `model.optim.sched` over `max_steps` optimizer steps, stepped once after each.

    It begins at `first_step`, the number of updates made so far; the rate at a step depends on nothing else that was.
    `linear` warms up from 0 and decays to min_lr at max_steps; `constant` warms up and stays. With warm-up the first
    step has learning rate 0, as in transformers; so has CosineAnnealing's, which without constant_steps begins at
    lr / (warmup_steps + 1) instead.
    """
    sched = optim.sched
    warmup = sched.warmup_steps or 0
    if sched.warmup_ratio is not None:
        warmup = int(sched.warmup_ratio * max_steps)
    _warn_of_short_run(optim, warmup, max_steps)
    for group in optimizer.param_groups:
        group["initial_lr"] = optim.lr  # torch asks for it where a schedule begins in its middle
    if sched.name == "CosineAnnealing":
        from nemo.core.optim.lr_scheduler import CosineAnnealing

        return CosineAnnealing(
            optimizer,
            max_steps=max_steps,
            warmup_steps=warmup,
            constant_steps=sched.constant_steps,
            min_lr=sched.min_lr,
            last_epoch=first_step - 1,
        )
    floor = sched.min_lr / optim.lr if sched.name == "linear" else 1.0
    return LambdaLR(optimizer, lambda step: _warm_then_linear(step, warmup, max_steps, floor), first_step - 1)


def _warn_of_short_run(optim: OptimConfig, warmup: int, max_steps: int) -> None:
    sched = optim.sched
    if warmup >= max_steps:
        logger.warning(
            "the run has %d steps and model.optim.sched warms up for %d: the learning rate never reaches "
            "model.optim.lr=%g; lower the warm-up",
            max_steps,
            warmup,
            optim.lr,
        )
    elif sched.name == "CosineAnnealing" and sched.constant_steps and max_steps <= warmup + sched.constant_steps:
        logger.warning(
            "the run has %d steps, not more than warm-up (%d) and model.optim.sched.constant_steps=%d together: right "
            "after the warm-up the learning rate is min_lr=%g; set constant_steps=0 to decay over the run",
            max_steps,
            warmup,
            sched.constant_steps,
            sched.min_lr,
        )


def _warm_then_linear(step: int, warmup: int, max_steps: int, floor: float) -> float:
    if step < warmup:
        return step / warmup
    left = (max_steps - step) / max(1, max_steps - warmup)
    return floor + (1.0 - floor) * max(0.0, left)
