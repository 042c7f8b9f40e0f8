"""Which pairs a step trains on: a pure function of the step number, the same on every rank.

The data-parallel ranks share one order; `nemo_dpo.data.batch.split_global_batch` deals a step's pairs to them. Hence
the order does not depend on the number of ranks, and the step number is all there is to save and to resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nemo_dpo.data.types import DataError


@dataclass(frozen=True)
class PairSampler:
    """Indices of the pairs of each step, epoch after epoch.

    In an epoch every pair comes once; the last batch holds what is left (1 … global_batch_size pairs) and is dropped
    only if `drop_last`. `shuffle` permutes every epoch anew, by (seed, epoch). `limit` ends each epoch early, see
    `limit_batches`. Raises DataError if an epoch would have no step.
    """

    num_pairs: int
    global_batch_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    limit: int | float | None = None

    def __post_init__(self) -> None:
        if self.num_pairs < 1 or self.global_batch_size < 1:
            raise DataError(
                f"cannot sample {self.num_pairs} pairs in batches of {self.global_batch_size}: both must be at least 1"
            )
        if self.drop_last and self.num_pairs < self.global_batch_size:
            raise DataError(
                f"{self.num_pairs} pairs are less than one batch of {self.global_batch_size} and drop_last=true drops "
                "them all: use a smaller global_batch_size or drop_last=false"
            )
        if self.steps_per_epoch < 1:
            raise DataError(
                f"a limit of {self.limit} batches leaves no step in an epoch: use at least 1, or 1.0 for all"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps (global batches) in one epoch."""
        whole, rest = divmod(self.num_pairs, self.global_batch_size)
        batches = whole if self.drop_last else whole + (rest > 0)
        return limit_batches(batches, self.limit)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the 0-based global `step` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """Pair indices of the 0-based global `step`, counted across epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        stop = min(start + self.global_batch_size, self.num_pairs)
        if not self.shuffle:
            return list(range(start, stop))
        indices: list[int] = _permutation(self.num_pairs, self.seed, epoch)[start:stop].tolist()
        return indices

    def consumed_pairs(self, step: int) -> int:
        """Pairs trained on before the 0-based global `step`: ragged batches count what they hold."""
        epoch, position = divmod(step, self.steps_per_epoch)
        per_epoch = min(self.steps_per_epoch * self.global_batch_size, self.num_pairs)
        return epoch * per_epoch + position * self.global_batch_size


@lru_cache(maxsize=2)
def _permutation(num_pairs: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of one epoch; kept, because a step needs a slice of it only."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(num_pairs)
    order.flags.writeable = False
    return order


def validation_batches(num_pairs: int, global_batch_size: int, limit: int | float | None = None) -> list[Sequence[int]]:
    """All pairs in file order, the ragged last batch included; the first `limit` batches of them if given."""
    starts = range(0, num_pairs, global_batch_size)
    kept = starts[: limit_batches(len(starts), limit)]
    return [range(start, min(start + global_batch_size, num_pairs)) for start in kept]


def limit_batches(batches: int, limit: int | float | None) -> int:
    """How many of `batches` a limit leaves, by Lightning's rule for `limit_*_batches`.

    An int is a number of batches, a float in [0, 1] a share of them, None all. A share above 0 leaves at least one
    batch: a small data set must not switch validation off without a word.
    """
    if limit is None:
        return batches
    if isinstance(limit, int):
        if limit < 0:
            raise DataError(
                f"a limit of {limit} batches is negative: use 0 or more, or a float such as 1.0 for a share"
            )
        return min(batches, limit)
    if not 0.0 <= limit <= 1.0:
        raise DataError(f"a limit of {limit} batches is not a share from 0.0 to 1.0: write a whole number as an int")
    return 0 if limit == 0.0 or batches == 0 else _share(batches, limit)


def interval_in_steps(interval: int | float, steps_per_epoch: int) -> int:
    """An interval in steps: an int is their number, a float a share of an epoch."""
    return interval if isinstance(interval, int) else _share(steps_per_epoch, interval)


def _share(batches: int, share: float) -> int:
    """Rounded down, and at least one."""
    # 0.29 × 100 is 28.999… in floating point; the share means 29.
    return max(1, math.floor(batches * share + 1e-9))
