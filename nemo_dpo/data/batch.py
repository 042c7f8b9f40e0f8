"""Pairs → tensors: micro-batches in the separate layout (each response in a row of its own, after its prompt).

The maths downstream never looks at rows: it follows index tensors (which positions predict response tokens, which
response each belongs to, which two responses form a pair), so that other layouts need another `collate` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nemo_dpo.data.types import TokenIds, TokenPair

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: rows of `S` tokens, `R` response tokens, `P` pairs. All tensors are int64 but `rewards`.

    A micro-batch without pairs (P = R = 0) keeps the collectives of all ranks in step where one has no pair left.
    """

    tokens: Tensor  # [rows, S], padded on the right with pad_id
    position_ids: Tensor  # [rows, S]
    response_positions: Tensor  # [R]: row × S + s of the position whose output predicts targets[r]
    targets: Tensor  # [R]: the response tokens themselves
    response_segment: Tensor  # [R]: number of the response, 0 … 2P − 1, that the token belongs to
    pair_segments: Tensor  # [P, 2]: response numbers (chosen, rejected)
    pair_index: Tensor  # [P]: index of the pair in the split
    rewards: Tensor  # [P, 2] float32: ground-truth rewards (chosen, rejected)
    tokens_real: int  # tokens that are not padding

    @property
    def num_pairs(self) -> int:
        return len(self.pair_index)

    @property
    def num_responses(self) -> int:
        return 2 * self.num_pairs

    @property
    def response_tokens(self) -> Tensor:
        """Tokens of each response, [N]."""
        return torch.bincount(self.response_segment, minlength=self.num_responses)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """The same batch with all tensors on `device`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=non_blocking)
        return MicroBatch(**values)


@dataclass(frozen=True)
class GlobalBatch:
    """One step's share of this data-parallel rank; all ranks have the same number of micro-batches.

    Attributes:
        split: name of the split that the micro-batches' `pair_index` counts in.
    """

    micro_batches: tuple[MicroBatch, ...]
    split: str = "train"

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GlobalBatch:
        """The same batch with all tensors on `device`."""
        moved = tuple(micro_batch.to(device, non_blocking) for micro_batch in self.micro_batches)
        return replace(self, micro_batches=moved)


class PairSource(Protocol):
    """What a batch is built from: `PairDataset`, or a list of TokenPair."""

    def __getitem__(self, index: int, /) -> TokenPair: ...


def collate(
    pairs: Sequence[TokenPair], *, pad_id: int, length: int | None = None, multiple: int = 1, rows: int | None = None
) -> MicroBatch:
    """Put pair p's chosen sequence into row 2p, its rejected one into row 2p + 1.

    S is `length` (default: the longest sequence) rounded up to a multiple of `multiple`; `rows` adds rows of padding up
    to that number (default: two per pair). Without pairs both have the least legal value. Raises ValueError if the
    pairs do not fit or a prompt is empty, as the first response token then has no position that predicts it.
    """
    size = max([1, *(pair.longest for pair in pairs)])
    if length is not None and length < size:
        raise ValueError(f"a sequence of {size} tokens does not fit into length={length}")
    size = _round_up(length or size, multiple)
    least_rows = max(2 * len(pairs), 1)
    if rows is not None and rows < least_rows:
        raise ValueError(f"{len(pairs)} pairs need {least_rows} rows, not rows={rows}")
    tokens = np.full((rows or least_rows, size), pad_id, dtype=np.int64)
    positions, targets, segments = _fill(tokens, pairs)
    number_of_rows = tokens.shape[0]
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.arange(size).repeat(number_of_rows, 1),
        response_positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        response_segment=torch.from_numpy(segments),
        pair_segments=torch.arange(2 * len(pairs)).view(-1, 2),
        pair_index=torch.tensor([pair.index for pair in pairs], dtype=torch.int64),
        rewards=torch.tensor([(pair.chosen_reward, pair.rejected_reward) for pair in pairs], dtype=torch.float32).view(
            -1, 2
        ),
        tokens_real=sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs),
    )


def _fill(tokens: Int64Array, pairs: Sequence[TokenPair]) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Write the sequences into `tokens`; return response positions, targets and response numbers, each [R]."""
    size = tokens.shape[1]
    responses: list[tuple[TokenIds, TokenIds]] = [
        (pair.prompt_ids, response) for pair in pairs for response in (pair.chosen_ids, pair.rejected_ids)
    ]
    positions = [np.empty(0, np.int64)]
    for row, (prompt, response) in enumerate(responses):
        if len(prompt) == 0:
            raise ValueError(
                f"pair {pairs[row // 2].index} has an empty prompt: nothing predicts its first response token"
            )
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + len(response)] = response
        first = row * size + len(prompt) - 1  # the output at position s predicts the token at s + 1
        positions.append(np.arange(first, first + len(response)))
    response_positions = np.concatenate(positions)
    segments = np.repeat(np.arange(len(responses)), [len(response) for _, response in responses])
    return response_positions, tokens.reshape(-1)[response_positions + 1], segments


def split_global_batch(
    indices: Sequence[int], *, dp_rank: int, dp_size: int, micro_batch_size: int, microbatch_group: int = 1
) -> list[list[int]]:
    """Deal one step's pairs: the micro-batches of data-parallel rank `dp_rank`, as lists of pair indices.

    Round m serves the next dp_size × micro_batch_size pairs, one to each rank in turn. So every pair is in exactly one
    place, all ranks have the same number of micro-batches (some short or empty in a ragged batch, by one pair at most
    between ranks), and that number is a multiple of `microbatch_group`, as interleaved pipeline schedules want it.
    """
    per_round = dp_size * micro_batch_size
    rounds = _round_up(-(-len(indices) // per_round), microbatch_group)
    return [list(indices[m * per_round : (m + 1) * per_round][dp_rank::dp_size]) for m in range(rounds)]


def build_global_batch(
    dataset: PairSource,
    indices: Sequence[int],
    *,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    microbatch_group: int = 1,
    pad_id: int,
    multiple: int = 1,
    uniform: bool = False,
    split: str = "train",
) -> GlobalBatch:
    """Read and collate this rank's share of one step's `indices` into `split`.

    `uniform` gives all micro-batches of the rank one rows × S shape, which pipeline stages need to size their receive
    buffers: rows = 2 × micro_batch_size, S = the rank's longest sequence rounded up to `multiple`. Otherwise each
    micro-batch is as small as its pairs allow.
    """
    parts = split_global_batch(
        indices,
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=micro_batch_size,
        microbatch_group=microbatch_group,
    )
    groups = [[dataset[index] for index in part] for part in parts]
    length = rows = None
    if uniform:
        length = max([1, *(pair.longest for group in groups for pair in group)])
        rows = 2 * micro_batch_size
    micro_batches = (collate(group, pad_id=pad_id, length=length, multiple=multiple, rows=rows) for group in groups)
    return GlobalBatch(tuple(micro_batches), split)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
