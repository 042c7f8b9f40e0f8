"""What happens between steps: logging, validation, checkpoints, stop requests. One callback: their order is fixed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from nemo_dpo.checkpoint import SaveError
from nemo_dpo.checkpoint.folders import point, remove
from nemo_dpo.checkpoint.writing import MIB, Writing
from nemo_dpo.config.checkpoint_names import checkpoint_name
from nemo_dpo.config.exp_manager import CheckpointCallbackParams
from nemo_dpo.data.sampler import PairSampler
from nemo_dpo.parallel.collective import gather, on_rank_zero
from nemo_dpo.training.data import Batches
from nemo_dpo.training.leave import Stop, Stopped
from nemo_dpo.training.module import Metrics, PreferenceModule
from nemo_dpo.training.nonfinite import NonFiniteError
from nemo_dpo.training.resume import Place
from nemo_dpo.training.space import warn_if_short

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rhythm:
    """When things happen, in optimizer steps."""

    max_steps: int
    val_interval: int
    save_interval: int
    log_interval: int
    sampler: PairSampler

    def position(self, step: int) -> dict[str, int]:
        """Where the data are after `step` updates."""
        return {"epoch": self.sampler.epoch(step), "consumed_samples": self.sampler.consumed_pairs(step)}


class Cadence(Callback):
    """Validates before the first step and every `val_interval` steps, then saves every `save_interval`.

    A row of metrics with step k is measured with the weights after k updates, in train/ as in val/. A stop does not
    wait for a validation: it is saved that one is due, and the next start begins with it.

    Args:
        requested: what asks any of the ranks to stop; collective.
        after_save: called after each save but the last.

    Attributes:
        stop: what the run was stopped by.
        validation_due: whether the weights are still to be validated before the next step; checkpoints record it.
    """

    def __init__(
        self,
        rhythm: Rhythm,
        validation: Batches | None,
        keeper: CheckpointKeeper | None,
        place: Place,
        requested: Callable[[], Stop | None],
        after_save: Callable[[], object] | None = None,
    ) -> None:
        self._rhythm = rhythm
        self._validation = validation
        self._validation_references: list[list[Tensor]] = []
        self._keeper = keeper
        self._requested = requested
        self._after_save = after_save
        self._latest: Metrics = {}
        self.validation_due = place.validation_due and validation is not None
        self.stop: Stop | None = None

    def on_train_start(self, trainer: Trainer, pl_module: PreferenceModule) -> None:  # type: ignore[override]
        """Validate the untouched policy, or what a stop has not let be validated."""
        self.make_up(trainer, pl_module)

    def make_up(self, trainer: Trainer, module: PreferenceModule) -> None:
        """Do what is due before the next step, if anything; Lightning begins no training that is at its last step."""
        if self.validation_due and not self.stop:
            if trainer.global_step:
                logger.info("step %d: validating first, what a stop has put off", trainer.global_step)
            self._between_steps(trainer, module, is_saved=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: PreferenceModule, *_: Any) -> None:  # type: ignore[override]
        """After each update: log, validate, save, stop."""
        step, rhythm = trainer.global_step, self._rhythm
        if (step - 1) % rhythm.log_interval == 0:
            self._log(trainer, "train", {**pl_module.metrics, **rhythm.position(step - 1)}, step - 1)
        if self._validation is not None:
            self.validation_due = step % rhythm.val_interval == 0 or step >= rhythm.max_steps
        self._between_steps(trainer, pl_module, is_saved=False)

    def _between_steps(self, trainer: Trainer, module: PreferenceModule, *, is_saved: bool) -> None:
        """`is_saved`: a checkpoint, or the start, has this step, with its validation due."""
        step = trainer.global_step
        if self._validation is not None and self.validation_due:
            self._validate(trainer, module, self._validation)
        self.stop = self._requested()
        if self._keeper and step and not (is_saved and self.validation_due):
            self._save_if_due(trainer, module, self._keeper)
        if self.stop:
            logger.warning("stopping after step %d: %s", step, self.stop.reason)
            trainer.should_stop = True

    def _save_if_due(self, trainer: Trainer, module: PreferenceModule, keeper: CheckpointKeeper) -> None:
        step, rhythm = trainer.global_step, self._rhythm
        ends = bool(self.stop) or step >= rhythm.max_steps
        due = ends or step % rhythm.save_interval == 0
        if due or keeper.is_writing:
            with module.watch.over(f"the save after step {step}"):
                keeper.settle()
                if due:
                    # Figures of earlier weights would rank these before better ones.
                    known = dict.fromkeys(self._latest, math.nan) if self.validation_due else self._latest
                    keeper.save(trainer, {**known, "step": step, **rhythm.position(step)})
                if ends:
                    keeper.settle(wait=True)
        if self._after_save and due and not ends:  # at the end `finish` exports; a stop has no time for it
            self._after_save()

    def on_exception(self, trainer: Trainer, pl_module: PreferenceModule, exception: BaseException) -> None:  # type: ignore[override]
        """Give up the save on its way, unless all ranks are here: they may be in different places now."""
        if not self._keeper:
            return
        if not isinstance(exception, NonFiniteError):
            self._keeper.abandon()
            return
        try:
            with pl_module.watch.over("the save on its way"):
                self._keeper.settle(wait=True)
        except (SaveError, OSError) as error:
            logger.warning("%s", error)

    def _validate(self, trainer: Trainer, module: PreferenceModule, pairs: Batches) -> None:
        start = time.perf_counter()
        try:
            metrics = module.evaluate(pairs, self._validation_references)
        except Stopped:
            return
        self.validation_due = False
        seconds = time.perf_counter() - start
        self._latest = {f"val_{name}": value for name, value in metrics.items()}
        self._log(trainer, "val", {**metrics, "validation_step_time": seconds}, trainer.global_step)
        logger.info("step %d: val loss %.4f, acc %.3f", trainer.global_step, metrics["loss"], metrics["acc"])

    @staticmethod
    def _log(trainer: Trainer, split: str, metrics: Metrics, step: int) -> None:
        named = {f"{split}/{name}": value for name, value in metrics.items()}
        for target in trainer.loggers:
            target.log_metrics(named, step)

    def state_dict(self) -> dict[str, Any]:
        """The metrics that the next save would name."""
        return {"latest": self._latest, "keeper": self._keeper.state_dict() if self._keeper else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""
        self._latest = state_dict["latest"]
        if self._keeper and state_dict["keeper"]:
            self._keeper.load_state_dict(state_dict["keeper"])


class CheckpointKeeper:
    """Names, writes and prunes the checkpoints of a run: the newest, and the best `save_top_k` by `monitor`.

    A checkpoint's score is that of the newest validation before it; one without a finite score is never among the best.
    Scores are remembered in the checkpoints themselves, not read from their names, and folders that this run did not
    write are left alone. Nothing is deleted before a newer checkpoint is complete.

    Args:
        mark: called where there is progress.
    """

    def __init__(self, folder: Path, params: CheckpointCallbackParams, mark: Callable[[], None]) -> None:
        self._folder = folder
        self._params = params
        self._mark = mark
        self._scores: dict[str, float] = {}
        self._writing: Writing | None = None

    def save(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Begin a checkpoint named after `values`; unless saves are asynchronous, complete it. Collective.

        Raises:
            SaveError: this one or the one before cannot be written.
        """
        self.settle(wait=True)
        self._mark()
        name = checkpoint_name(self._params.filename, values)
        self._scores[name] = float(values.get(self._params.monitor, math.nan))
        trainer.save_checkpoint(self._folder / name)
        self._writing = trainer.strategy.writing  # type: ignore[attr-defined]
        self._mark()
        if not self._params.async_save:
            self.settle(wait=True)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._writing is not None

    def settle(self, *, wait: bool = False) -> None:
        """Complete the checkpoint that is on its way, if all ranks have written theirs; then prune. Collective.

        Args:
            wait: until it is written.

        Raises:
            SaveError: it cannot be written; those before it are untouched.
        """
        writing = self._writing
        if writing is None or (not wait and any(gather(writing.busy()))):
            return
        self._writing = None
        writing.finish()
        self._mark()
        kept = {writing.folder.name, *self._best()}
        on_rank_zero(lambda: self._make_current(writing, self._scores.keys() - kept))
        self._scores = {name: score for name, score in self._scores.items() if name in kept}

    def abandon(self) -> None:
        """Give up what is being written."""
        if self._writing:
            self._writing.abandon()

    def _make_current(self, writing: Writing, surplus: Iterable[str]) -> None:
        point(self._folder / "last", writing.folder.name)  # first: what it pointed to may be among what is deleted
        for name in surplus:
            remove(self._folder / name)
        logger.info(
            "saved %s: %.1f MiB in %.1f s, of which training waited %.1f s",
            writing.folder.name,
            writing.bytes / MIB,
            writing.seconds,
            writing.blocked,
        )
        warn_if_short(self._folder, writing.bytes)

    def _best(self) -> list[str]:
        if self._params.save_top_k == -1:
            return list(self._scores)
        finite = [name for name, score in self._scores.items() if math.isfinite(score)]
        best_first = sorted(finite, key=self._scores.__getitem__, reverse=self._params.mode == "max")
        return best_first[: self._params.save_top_k]

    def state_dict(self) -> dict[str, Any]:
        """Scores of the checkpoints that exist."""
        return {"scores": dict(self._scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""
        self._scores = dict(state["scores"])
