"""Functions for `run_cli(patches=…)` that stop a run, or make a resume forget one part of the state."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from tests.cli.probes import wrap

STOP_AFTER = 3


def stop_early() -> None:
    """SIGTERM reaches the last rank, and no other, while step 2 (the third) runs."""
    from nemo_dpo.training.module import PreferenceModule

    def train(step: Any, module: Any, batch: Any, number: int) -> None:
        step(module, batch, number)
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if last and module.trainer.global_step == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)

    wrap(PreferenceModule, "training_step", train)


def own_clocks() -> None:
    """Each rank reads another time."""
    wrap(time, "strftime", lambda strftime, *args: f"{strftime(*args)}-{os.environ.get('RANK')}")


def forget_rng() -> None:
    """Dropout masks start from the seed again."""
    from nemo_dpo.checkpoint import sharded

    sharded._restore_rng = lambda states: None


def forget_sampler() -> None:
    """The pairs come from the first step's on again."""
    from nemo_dpo.training import data

    wrap(data._StepsFrom, "__init__", lambda init, self, start, stop: init(self, lambda: 0, stop))


def forget_schedule() -> None:
    """It warms up again."""
    from nemo_dpo.training import module

    wrap(module, "build_scheduler", lambda build, handle, optim, _first, last: build(handle, optim, 0, last))


def forget_optimizer() -> None:
    """Adam's moments start from zero again."""
    from nemo_dpo.parallel.engine import Engine

    def load(loader: Any, engine: Engine, state: Any) -> None:
        loader(engine, state)
        for part in engine.optimizer.chained_optimizers:
            for moments in part.optimizer.state.values():
                moments["exp_avg"].zero_()
                moments["exp_avg_sq"].zero_()

    wrap(Engine, "load_optimizer", load)


def forget_own_steps() -> None:
    """megatron-core's own loading: one `step` tensor for all parameters."""
    from nemo_dpo.parallel import mcore_repairs

    mcore_repairs.separate_steps = lambda part: None
