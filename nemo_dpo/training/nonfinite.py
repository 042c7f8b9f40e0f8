"""Steps whose loss or gradient is NaN or infinite: no update is made of them, and the run stops, or goes on and counts.

Such a step is a step all the same: data and schedule move on, weights and optimizer do not. Nothing is computed for
this in a step that is sound; of one that is not, every rank knows by the loss and the norm that all have in common.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_dpo.config.schema import TrainerDpoConfig
from nemo_dpo.data.batch import GlobalBatch, MicroBatch
from nemo_dpo.data.jsonl import Source
from nemo_dpo.parallel.collective import gather, on_rank_zero
from nemo_dpo.parallel.groups import Groups
from nemo_dpo.training.step import Outcome

logger = logging.getLogger(__name__)

FILE = "nonfinite.jsonl"
NAMED_PAIRS = 3  # in a message; the file has all
SIDES = ("chosen", "rejected")
WORDS = {"loss": "the loss", "grad_norm": "gradient norm"}


class NonFiniteError(FloatingPointError):
    """The run is to stop at a step that is not finite; raised on all ranks alike."""


class NonFinite:
    """Judges each step; one that is not finite is written to `path` with its pairs.

    Attributes:
        skipped: updates left out since the run began.
        in_a_row: of them, those that no update has followed.
    """

    def __init__(self, limits: TrainerDpoConfig, path: Path, source: Callable[[int], Source], groups: Groups) -> None:
        self._skips = limits.on_nonfinite == "skip"
        self._longest = limits.max_consecutive_skips
        self._path = path
        self._source = source
        self._groups = groups
        self.skipped = 0
        self.in_a_row = 0

    @property
    def figures(self) -> dict[str, float]:
        """What a row of metrics says."""
        return {"skipped_steps": self.skipped} if self._skips else {}

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint records."""
        return {"skipped_steps": self.skipped, "skipped_in_a_row": self.in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; a checkpoint of a version without it has none."""
        self.skipped = int(state.get("skipped_steps", 0))
        self.in_a_row = int(state.get("skipped_in_a_row", 0))

    def judge(
        self,
        step: int,
        figures: Mapping[str, float],
        batch: GlobalBatch,
        outcomes: Sequence[Outcome],
        references: Sequence[Tensor],
    ) -> None:
        """Count a step that made no update, or stop. Collective where `figures` are not finite.

        Args:
            figures: `loss` and `grad_norm`, the same on all ranks.
            outcomes: of this rank's micro-batches, on the last stage; so are `references`, the reference's log-probs.

        Raises:
            NonFiniteError: the run is to stop.
        """
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if not broken:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        goes_on = self._skips and self.in_a_row <= self._longest
        self.skipped += goes_on
        pairs = [pair for found in gather(list(self._pairs(batch, outcomes, references))) for pair in found]
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "step": step,
            **{name: str(value) for name, value in figures.items()},
            "action": "skip" if goes_on else "stop",
            "pairs": pairs,
        }
        on_rank_zero(lambda: self._write(row))
        what = f"{WORDS[broken[0]]} is {figures[broken[0]]}"
        text = f"step {step}: {what}; no parameter was changed. {self._told(pairs)}"
        if not goes_on:
            raise NonFiniteError(text + self._limit_reached())
        logger.warning("%s (update left out; in a row %d, in all %d)", text, self.in_a_row, self.skipped)

    def _pairs(
        self, batch: GlobalBatch, outcomes: Sequence[Outcome], references: Sequence[Tensor]
    ) -> Iterator[dict[str, Any]]:
        """This data-parallel rank's pairs, by one of its ranks: index, place, and which log-probs are not finite."""
        if self._groups.tp.rank():
            return
        for micro_batch, outcome, reference in zip(batch, outcomes, references, strict=bool(outcomes)):
            broken = _broken(micro_batch, {"policy": outcome.logps, "reference": reference})
            for index, names in zip(micro_batch.pair_index.tolist(), broken, strict=True):
                place = self._source(index)
                yield {"index": index, "file": place.file, "line": place.line, "nonfinite": names}

    def _write(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _told(self, pairs: Sequence[Mapping[str, Any]]) -> str:
        named = [f"{pair['file']}:{pair['line']}" for pair in pairs if pair["nonfinite"]]
        if not named:
            return f"The log-probs of its pairs are finite; the pairs are in {self._path}"
        more = f" and {len(named) - NAMED_PAIRS} more" if len(named) > NAMED_PAIRS else ""
        first = ", ".join(named[:NAMED_PAIRS])
        return f"Log-probs that are not finite: {first}{more}; all its pairs are in {self._path}"

    def _limit_reached(self) -> str:
        if not self._skips:
            return ""
        return f" ({self.in_a_row} such steps in a row; trainer.dpo.max_consecutive_skips={self._longest})"


def _broken(batch: MicroBatch, logps: Mapping[str, Tensor]) -> list[list[str]]:
    """For each pair the names of its log-probs [N] that are not finite, such as "policy chosen"."""
    return [
        [
            f"{model} {side}"
            for model, values in logps.items()
            for side, row in zip(SIDES, rows, strict=True)
            if not math.isfinite(values[row].item())
        ]
        for rows in batch.pair_segments.tolist()
    ]
