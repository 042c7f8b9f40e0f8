"""Functions for `run_cli(patches=…)` that stop a run, or make a resume forget one part of the state."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.probes import log_dir, wrap

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


POISONED = 5  # the training pair whose log-probs become NaN


def poison_a_pair() -> None:
    """The policy's log-prob of one training pair's chosen response is NaN, in whichever batch it comes."""
    _poison(lambda index: index == POISONED)


def poison_all_pairs() -> None:
    """The same of every training pair."""
    _poison(lambda index: True)


def _poison(wanted: Callable[[int], bool]) -> None:
    from nemo_dpo.training import step

    def forward(run: Any, iterator: Any, chunk: Any, loss: Any) -> Any:
        def poisoned(batch: Any, logps: Any, logit_sums: Any) -> Any:
            rows = [pair for pair, index in enumerate(batch.pair_index.tolist()) if chunk.training and wanted(index)]
            factor = logps.new_ones(len(logps))
            factor[batch.pair_segments[rows, 0]] = math.nan
            return loss(batch, logps * factor, logit_sums)

        return run(iterator, chunk, poisoned)

    wrap(step, "forward_responses", forward)


def watch_weights() -> None:
    """Leave facts/<rank>.json: a digest of this rank's trained weights after each step."""
    from nemo_dpo.training.module import PreferenceModule

    digests: list[str] = []

    def train(step: Any, module: Any, batch: Any, number: int) -> None:
        step(module, batch, number)
        digest = hashlib.sha256()
        for weight in module.engine.trainable:
            digest.update(weight.detach().float().numpy().tobytes())
        digests.append(digest.hexdigest())
        folder = log_dir() / "facts"
        folder.mkdir(exist_ok=True)
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(digests))

    wrap(PreferenceModule, "training_step", train)


def change_the_data() -> None:
    """The training file has other pairs after the first step."""
    from nemo_dpo.training.module import PreferenceModule
    from tests.support.tiny import write_pairs

    def train(step: Any, module: Any, batch: Any, number: int) -> None:
        step(module, batch, number)
        write_pairs(Path(module._nonfinite._source(0).file), 27, seed=9)

    wrap(PreferenceModule, "training_step", train)
