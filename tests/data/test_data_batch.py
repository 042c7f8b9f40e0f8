"""Pairs → tensors, against tensors written by hand and a slow walk over the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_dpo.data import TokenPair
from nemo_dpo.data.batch import MicroBatch, build_global_batch, collate

PAD = 99


def pair(
    index: int, prompt: list[int], chosen: list[int], rejected: list[int], rewards: tuple[float, float]
) -> TokenPair:
    arrays = (np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))
    return TokenPair(index, *arrays, *rewards)


TWO = [pair(7, [5, 6], [10, 11, 12], [20], (1.5, -0.5)), pair(3, [8], [30], [40, 41], (0.25, 0.125))]


def test_two_pairs_by_hand() -> None:
    batch = collate(TWO, pad_id=PAD, multiple=2)
    assert batch.tokens.tolist() == [
        [5, 6, 10, 11, 12, PAD],
        [5, 6, 20, PAD, PAD, PAD],
        [8, 30, PAD, PAD, PAD, PAD],
        [8, 40, 41, PAD, PAD, PAD],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    # Row 0: 10, 11, 12 stand at 2, 3, 4 and are predicted at 1, 2, 3; row 1 starts at 6, row 2 at 12, row 3 at 18.
    assert batch.response_positions.tolist() == [1, 2, 3, 7, 12, 18, 19]
    assert batch.targets.tolist() == [10, 11, 12, 20, 30, 40, 41]
    assert batch.response_segment.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert batch.pair_segments.tolist() == [[0, 1], [2, 3]]
    assert batch.pair_index.tolist() == [7, 3]
    assert batch.rewards.tolist() == [[1.5, -0.5], [0.25, 0.125]]
    assert (batch.tokens_real, batch.num_pairs, batch.num_responses) == (5 + 3 + 2 + 3, 2, 4)


def test_types() -> None:
    for batch in (collate(TWO, pad_id=PAD), collate([], pad_id=PAD)):
        assert batch.rewards.dtype == torch.float32
        for name in ("tokens", "position_ids", "response_positions", "targets", "response_segment", "pair_segments"):
            assert getattr(batch, name).dtype == torch.int64, name
        assert batch.pair_index.dtype == torch.int64


def test_a_micro_batch_without_pairs() -> None:
    batch = collate([], pad_id=PAD, length=3, multiple=4, rows=2)
    assert batch.tokens.tolist() == [[PAD] * 4] * 2
    assert batch.position_ids.shape == (2, 4)
    assert batch.response_positions.shape == batch.targets.shape == batch.response_segment.shape == (0,)
    assert batch.pair_segments.shape == batch.rewards.shape == (0, 2)
    assert (batch.tokens_real, batch.num_pairs, batch.num_responses) == (0, 0, 0)
    assert collate([], pad_id=PAD, multiple=4).tokens.shape == (1, 4)


def test_rows_and_length_are_filled_with_padding() -> None:
    batch = collate(TWO[1:], pad_id=PAD, length=4, rows=3)
    assert batch.tokens.tolist() == [[8, 30, PAD, PAD], [8, 40, 41, PAD], [PAD] * 4]
    assert batch.response_positions.tolist() == [0, 4, 5]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens does not fit into length=4"):
        collate(TWO, pad_id=PAD, length=4)
    with pytest.raises(ValueError, match="2 pairs need 4 rows, not rows=3"):
        collate(TWO, pad_id=PAD, rows=3)
    with pytest.raises(ValueError, match="pair 4 has an empty prompt"):
        collate([pair(4, [], [1], [2], (1, 0))], pad_id=PAD)


ids = st.lists(st.integers(0, 98), min_size=1, max_size=6)
token_pairs = st.lists(st.builds(lambda p, c, r: pair(0, p, c, r, (1.0, 0.0)), ids, ids, ids), max_size=4)


@given(token_pairs, st.integers(1, 5), st.integers(0, 3))
def test_index_tensors_against_a_slow_walk(pairs: list[TokenPair], multiple: int, more_rows: int) -> None:
    batch = collate(pairs, pad_id=PAD, multiple=multiple, rows=max(2 * len(pairs), 1) + more_rows)
    size = batch.tokens.shape[1]
    assert size % multiple == 0 and size - multiple < max([1, *(p.longest for p in pairs)])
    expected = []
    for p, token_pair in enumerate(pairs):
        for side, response in enumerate((token_pair.chosen_ids, token_pair.rejected_ids)):
            for t, token in enumerate(response):
                row = 2 * p + side
                expected.append((row * size + len(token_pair.prompt_ids) + t - 1, int(token), row))
                assert batch.tokens[row, len(token_pair.prompt_ids) + t] == token
    got = zip(batch.response_positions.tolist(), batch.targets.tolist(), batch.response_segment.tolist(), strict=True)
    assert list(got) == expected
    assert batch.tokens_real == int((batch.tokens != PAD).sum())


def build(rank: int, *, uniform: bool, indices: list[int], group: int = 1) -> list[MicroBatch]:
    dataset = [pair(i, [i] * (i + 1), [50 + i], [60 + i, 60 + i], (1.0, 0.0)) for i in range(6)]
    batch = build_global_batch(
        dataset,
        indices,
        dp_rank=rank,
        dp_size=2,
        micro_batch_size=2,
        microbatch_group=group,
        pad_id=PAD,
        multiple=4,
        uniform=uniform,
    )
    assert len(batch) == len(list(batch))
    return list(batch)


def test_a_global_batch_is_dealt_and_collated() -> None:
    # longest sequence of pair i: i + 3 tokens, rounded up to 4 or 8.
    first, second = build(0, uniform=False, indices=[0, 1, 5, 3, 4])
    assert (first.pair_index.tolist(), second.pair_index.tolist()) == ([0, 5], [4])
    assert (first.tokens.shape, second.tokens.shape) == ((4, 8), (2, 8))
    first, second = build(1, uniform=False, indices=[0, 1, 5, 3, 4])
    assert (first.pair_index.tolist(), second.pair_index.tolist()) == ([1, 3], [])
    assert second.tokens.shape == (1, 4)


def test_uniform_micro_batches_have_one_shape() -> None:
    shapes = [
        [tuple(micro.tokens.shape) for micro in build(r, uniform=True, indices=[0, 1, 5, 0, 1], group=2)]
        for r in (0, 1)
    ]
    assert shapes == [[(4, 8), (4, 8)], [(4, 4), (4, 4)]]
    assert [tuple(micro.tokens.shape) for micro in build(1, uniform=True, indices=[2])] == [(4, 4)]


def test_shape_does_not_change_what_is_predicted() -> None:
    for plain, uniform in zip(
        build(0, uniform=False, indices=[5, 1, 0, 3, 2]), build(0, uniform=True, indices=[5, 1, 0, 3, 2]), strict=True
    ):
        assert plain.targets.tolist() == uniform.targets.tolist()
        assert plain.response_segment.tolist() == uniform.response_segment.tolist()
        for batch in (plain, uniform):
            assert batch.tokens.reshape(-1)[batch.response_positions + 1].tolist() == batch.targets.tolist()


def test_to_moves_every_tensor() -> None:
    batch = build_global_batch(TWO, [0, 1], dp_rank=0, dp_size=1, micro_batch_size=1, pad_id=PAD)
    moved = batch.to("meta")
    for before, after in zip(batch, moved, strict=True):
        assert after.tokens_real == before.tokens_real
        for name in (
            "tokens",
            "position_ids",
            "response_positions",
            "targets",
            "pair_segments",
            "pair_index",
            "rewards",
        ):
            assert getattr(after, name).device.type == "meta", name
            assert getattr(after, name).shape == getattr(before, name).shape
