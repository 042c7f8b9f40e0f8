"""The order of the pairs: exact in every layout, and the same on every rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_dpo.data import DataError, PairSampler, validation_batches
from nemo_dpo.data.batch import split_global_batch
from nemo_dpo.data.sampler import interval_in_steps, limit_batches

sizes = st.integers(1, 60)
batches = st.integers(1, 25)


def epoch(sampler: PairSampler, number: int) -> list[list[int]]:
    first = number * sampler.steps_per_epoch
    return [sampler.batch(step) for step in range(first, first + sampler.steps_per_epoch)]


@given(sizes, batches, st.integers(0, 3), st.booleans(), st.integers(0, 2))
def test_each_pair_comes_once_an_epoch(n: int, size: int, seed: int, shuffle: bool, number: int) -> None:
    steps = epoch(PairSampler(n, size, seed, shuffle=shuffle), number)
    assert sorted(index for step in steps for index in step) == list(range(n))
    assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) <= size


@given(sizes, batches, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_each_pair_is_on_one_rank_in_one_micro_batch(n: int, size: int, dp: int, micro: int, group: int) -> None:
    for step in epoch(PairSampler(n, size, seed=1), 0):
        ranks = [
            split_global_batch(step, dp_rank=r, dp_size=dp, micro_batch_size=micro, microbatch_group=group)
            for r in range(dp)
        ]
        assert sorted(i for rank in ranks for part in rank for i in part) == sorted(step)
        counts = {len(rank) for rank in ranks}
        assert len(counts) == 1 and counts.pop() % group == 0, "all ranks have as many micro-batches, whole groups"
        for together in zip(*ranks, strict=True):
            lengths = [len(part) for part in together]
            assert max(lengths) <= micro and max(lengths) - min(lengths) <= 1
        assert sum(any(parts) for parts in zip(*ranks, strict=True)) == -(-len(step) // (dp * micro)), "no idle round"


def test_dealing_by_hand() -> None:
    def deal(rank: int, group: int) -> list[list[int]]:
        return split_global_batch(range(11), dp_rank=rank, dp_size=2, micro_batch_size=2, microbatch_group=group)

    assert deal(0, 1) == [[0, 2], [4, 6], [8, 10]]
    assert deal(1, 1) == [[1, 3], [5, 7], [9]]
    assert deal(1, 2) == [[1, 3], [5, 7], [9], []]


def test_the_order_is_the_one_that_checkpoints_were_made_with() -> None:
    # Golden: another order after an upgrade would repeat and lose pairs in every resumed epoch.
    sampler = PairSampler(10, 4, seed=1)
    assert [sampler.batch(step) for step in range(4)] == [[8, 4, 7, 0], [1, 2, 5, 9], [6, 3], [7, 2, 4, 6]]
    assert [sampler.epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [sampler.consumed_pairs(step) for step in range(8)] == [0, 4, 8, 10, 14, 18, 20, 24]


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    def order(seed: int, number: int, size: int = 7) -> list[int]:
        return [i for step in epoch(PairSampler(50, size, seed), number) for i in step]

    orders = [order(1, 0), order(1, 1), order(2, 0), order(2, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(1, 0, size=8) == order(1, 0)
    # Asking in another sequence gives the same answers: the step number is the whole state.
    sampler = PairSampler(50, 7, seed=1)
    assert [sampler.batch(step) for step in (20, 3, 11)] == [PairSampler(50, 7, 1).batch(step) for step in (20, 3, 11)]


def test_file_order_without_shuffling() -> None:
    sampler = PairSampler(5, 2, seed=1, shuffle=False)
    assert [sampler.batch(step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_drop_last_drops_the_ragged_batch_only() -> None:
    sampler = PairSampler(10, 4, seed=1, drop_last=True)
    assert [len(step) for step in epoch(sampler, 0)] == [4, 4]
    assert sampler.consumed_pairs(3) == 12
    assert [len(step) for step in epoch(PairSampler(8, 4, 1, drop_last=True), 0)] == [4, 4]


def test_fewer_pairs_than_a_batch() -> None:
    sampler = PairSampler(3, 512, seed=1)
    assert sampler.steps_per_epoch == 1
    assert sorted(sampler.batch(0)) == sorted(sampler.batch(1)) == [0, 1, 2]
    with pytest.raises(DataError, match=r"3 pairs are less than one batch of 512 and drop_last=true"):
        PairSampler(3, 512, seed=1, drop_last=True)


@pytest.mark.parametrize("n, size", [(0, 4), (4, 0)])
def test_nothing_to_sample(n: int, size: int) -> None:
    with pytest.raises(DataError, match="must be at least 1"):
        PairSampler(n, size, seed=1)


def test_a_limit_ends_each_epoch_early() -> None:
    sampler = PairSampler(10, 4, seed=1, limit=2)
    assert [sampler.epoch(step) for step in range(5)] == [0, 0, 1, 1, 2]
    assert sampler.batch(2) == [7, 2, 4, 6], "the second epoch starts where the unlimited one does"
    assert [sampler.consumed_pairs(step) for step in range(4)] == [0, 4, 8, 12]
    with pytest.raises(DataError, match="leaves no step"):
        PairSampler(10, 4, seed=1, limit=0)


def test_limits_by_hand() -> None:
    assert [limit_batches(100, limit) for limit in (None, 1.0, 0.29, 0.5, 0.001, 0.0)] == [100, 100, 29, 50, 1, 0]
    assert [limit_batches(7, limit) for limit in (0, 1, 7, 50)] == [0, 1, 7, 7]
    assert limit_batches(0, 1.0) == 0
    assert [interval_in_steps(every, 100) for every in (0.29, 0.57, 0.001, 1.0, 1, 250)] == [29, 57, 1, 100, 1, 250]
    for bad in (-1, 1.5, -0.5, float("nan")):
        with pytest.raises(DataError, match="a limit of"):
            limit_batches(10, bad)


def test_validation_sees_all_pairs_in_file_order() -> None:
    assert [list(batch) for batch in validation_batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert [list(batch) for batch in validation_batches(5, 2, 0.7)] == [[0, 1], [2, 3]]
    assert [list(batch) for batch in validation_batches(3, 64, 1.0)] == [[0, 1, 2]]
    assert validation_batches(5, 2, 0) == []
