"""Which rows of several data files make up a split: weights → counts and order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nemo_dpo.data.types import DataError

Rows = npt.NDArray[np.int64]


def blend_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many pairs each file contributes, so that the total stays sum(sizes) and the shares are the weights'.

    File i gets weight_i / sum(weights) of the total, rounded down; what rounding leaves goes to the largest
    remainders. Raises DataError for a weight that is not positive or leaves its file without a pair.
    """
    if len(weights) != len(sizes) or not all(0.0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights {list(weights)} of {len(sizes)} files: each file needs one positive number")
    total = sum(sizes)
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        i = counts.index(0)
        raise DataError(
            f"weight {weights[i]} of {list(weights)} leaves none of {total} pairs to its file: leave it out"
        )
    return counts


def blend(sizes: Sequence[int], weights: Sequence[float]) -> Rows:
    """The blended order: positions in the concatenation of the files, sum(sizes) of them.

    A file that contributes more pairs than it has is passed through as often as that takes, and the last, partial
    pass takes rows at even distances; so does a file that contributes fewer. The files are interleaved evenly, so that
    any stretch of the order has about the weights' shares, without shuffling as well.
    """
    counts = blend_counts(sizes, weights)
    starts = np.cumsum([0, *sizes[:-1]])
    rows = [start + _take(size, count) for start, size, count in zip(starts, sizes, counts, strict=True)]
    when = [(np.arange(count) + 0.5) / count for count in counts]
    order: Rows = np.concatenate(rows)[np.argsort(np.concatenate(when), kind="stable")]
    return order


def _take(size: int, count: int) -> Rows:
    """`count` of `size` rows: whole passes, then rows at even distances."""
    passes, rest = divmod(count, size)
    return np.concatenate([np.tile(np.arange(size), passes), np.arange(rest) * size // max(rest, 1)])
