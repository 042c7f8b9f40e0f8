"""Weights → how many pairs of each file, in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_dpo.data import DataError
from nemo_dpo.data.blend import blend, blend_counts


def test_counts_by_hand() -> None:
    assert blend_counts([4, 2], [1, 1]) == [3, 3]
    assert blend_counts([6, 4], [0.3, 0.7]) == [3, 7]
    # 10/3 each: 3, 3, 3 and the one left to the first of the equal remainders.
    assert blend_counts([5, 3, 2], [2, 2, 2]) == [4, 3, 3]
    assert blend_counts([7], [0.1]) == [7]


def test_order_by_hand() -> None:
    # File 0 has rows 0…3 and gives 3 of them at even distances (0, 1, 2); file 1 has rows 4, 5 and gives a whole pass
    # and one more (4, 5, 4). Both are spread evenly over the order.
    assert blend([4, 2], [1, 1]).tolist() == [0, 4, 1, 5, 2, 4]
    # 8 rows, 6 from file 1 (three passes), 2 from file 0 (rows 0 and 3 of 6) at 1/4 and 3/4 of the way;
    # where two files are due at once, the first comes first.
    assert blend([6, 2], [0.25, 0.75]).tolist() == [6, 0, 7, 6, 7, 3, 6, 7]


sizes_and_weights = st.lists(st.tuples(st.integers(1, 40), st.floats(0.2, 5.0)), min_size=1, max_size=5)


@given(sizes_and_weights)
def test_shares_totals_and_repeats(files: list[tuple[int, float]]) -> None:
    sizes, weights = [size for size, _ in files], [weight for _, weight in files]
    total = sum(sizes)
    if min(weights) / sum(weights) * total < 1:
        return  # may leave a file without a pair, which is an error
    counts = blend_counts(sizes, weights)
    order = blend(sizes, weights)
    assert len(order) == sum(counts) == total
    starts = np.cumsum([0, *sizes])
    for i, (size, weight, count) in enumerate(zip(sizes, weights, counts, strict=True)):
        assert abs(count - weight / sum(weights) * total) < 1
        mine = (order >= starts[i]) & (order < starts[i + 1])
        repeats = np.bincount(order[mine] - starts[i], minlength=size)
        assert repeats.sum() == count
        assert repeats.max() - repeats.min() <= 1, "no row is repeated before all rows have come"
        # Interleaved: any beginning of the order holds the file's share, give or take one pair per file.
        expected = np.arange(1, total + 1) * count / total
        assert np.abs(np.cumsum(mine) - expected).max() <= len(sizes)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(DataError, match="each file needs one positive number"):
        blend_counts([3, 3], weights)


def test_a_weight_that_leaves_its_file_out_is_an_error() -> None:
    with pytest.raises(DataError, match=r"weight 0\.001 .* leaves none of 6 pairs"):
        blend_counts([3, 3], [1.0, 0.001])
