"""Learning-rate schedules: NeMo's own CosineAnnealing, and transformers' linear and constant."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nemo_dpo.config.schema import OptimConfig


def build_scheduler(optimizer: Optimizer, optim: OptimConfig, max_steps: int) -> LRScheduler:
    """The schedule of `model.optim.sched` over `max_steps` optimizer steps, stepped once after each.

    `linear` warms up from 0 and decays to min_lr at max_steps; `constant` warms up and stays. With warm-up the first
    step has learning rate 0, as in transformers; so has CosineAnnealing's, which without constant_steps begins at
    lr / (warmup_steps + 1) instead.
    """
    sched = optim.sched
    warmup = sched.warmup_steps or 0
    if sched.warmup_ratio is not None:
        warmup = int(sched.warmup_ratio * max_steps)
    if sched.name == "CosineAnnealing":
        from nemo.core.optim.lr_scheduler import CosineAnnealing

        return CosineAnnealing(
            optimizer,
            max_steps=max_steps,
            warmup_steps=warmup,
            constant_steps=sched.constant_steps,
            min_lr=sched.min_lr,
        )
    floor = sched.min_lr / optim.lr if sched.name == "linear" else 1.0
    return LambdaLR(optimizer, lambda step: _warm_then_linear(step, warmup, max_steps, floor))


def _warm_then_linear(step: int, warmup: int, max_steps: int, floor: float) -> float:
    if step < warmup:
        return step / warmup
    left = (max_steps - step) / max(1, max_steps - warmup)
    return floor + (1.0 - floor) * max(0.0, left)
