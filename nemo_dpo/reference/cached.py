"""Reference log-probs computed once, before training, and looked up afterwards: no second copy of any weight."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.data.batch import GlobalBatch, MicroBatch
from nemo_dpo.parallel.collective import agree, on_rank_zero
from nemo_dpo.parallel.groups import Groups
from nemo_dpo.reference.table import ROW, Header, Rows, TableWriter, open_table

logger = logging.getLogger(__name__)

# What computes the log-probs, with the contract of `Reference.logps`.
Source = Callable[[GlobalBatch], list[Tensor]]


@dataclass(frozen=True)
class Pairs:
    """A split as `fill` sees it.

    Attributes:
        count: its pairs.
        fingerprint: hash of their tokens, in order.
        batch: indices of pairs → the global batch of them, this data-parallel rank's share.
    """

    count: int
    fingerprint: str
    batch: Callable[[Sequence[int]], GlobalBatch]


class CachedReference:
    """Reads the rows of a batch's pairs from the tables of their split."""

    def __init__(self, tables: Mapping[str, Rows], groups: Groups) -> None:
        self._tables = tables
        self._groups = groups

    def logps(self, batch: GlobalBatch) -> list[Tensor]:
        """See `Reference.logps`.

        Raises:
            CheckpointError: a row is of a response of another length.
        """
        if not self._groups.is_last_stage():
            return []
        return [self._look_up(batch.split, micro_batch) for micro_batch in batch]

    def _look_up(self, split: str, batch: MicroBatch) -> Tensor:
        rows = self._tables[split][batch.pair_index.cpu().numpy()]
        chosen_and_rejected = batch.pair_segments.cpu()
        tokens = torch.tensor(rows["tokens"])
        if not torch.equal(tokens, batch.response_tokens.cpu()[chosen_and_rejected].to(tokens.dtype)):
            raise CheckpointError(
                f"the cached reference log-probs of {split} are not in the order of its pairs, or damaged; delete the "
                "folder in model.dpo.reference.cache_dir to compute them again"
            )
        logps = torch.empty(batch.num_responses)
        logps[chosen_and_rejected] = torch.tensor(rows["logps"])
        return logps.to(batch.tokens.device)


def fill(
    folder: Path,
    key: Mapping[str, Any],
    splits: Mapping[str, Pairs],
    source: Source,
    groups: Groups,
    *,
    pairs_per_pass: int,
    stop: Callable[[], object],
) -> CachedReference | None:
    """Compute what the tables `folder`/<split> lack, and open them. Collective.

    Args:
        key: name → value of all that decides the log-probs, but the pairs; values as json has them, or such mappings of
            them. The layout of the ranks is none of it, unless the weights depend on it.
        pairs_per_pass: pairs, over all ranks, between two writes: at most these are lost by a kill.
        stop: asked on all ranks after each pass, with the same answer.

    Returns:
        None if `stop` said so; the rows so far are kept.

    Raises:
        CheckpointError: a table there has another key, which is named with both values, or is damaged.
    """
    tables = {}
    for split, pairs in splits.items():
        header = Header(pairs.count, {**key, "data": pairs.fingerprint})
        if on_rank_zero((folder / split).is_dir):
            logger.info("reference log-probs of %s found in %s", split, folder / split)
        elif not _fill_split(folder / split, header, pairs, source, groups, pairs_per_pass, stop):
            return None
        tables[split] = agree(partial(open_table, folder / split, header))
    return CachedReference(tables, groups)


def _fill_split(
    folder: Path,
    header: Header,
    pairs: Pairs,
    source: Source,
    groups: Groups,
    pairs_per_pass: int,
    stop: Callable[[], object],
) -> bool:
    """Whether the table is complete."""
    with closing(TableWriter(folder, header)) as writer:
        done = on_rank_zero(writer.begin)
        logger.info("computing reference log-probs into %s, from pair %d of %d", folder, done, pairs.count)
        with _progress_bar(folder.name, done, pairs.count, groups.rank) as bar:
            for start in range(done, pairs.count, pairs_per_pass):
                indices = range(start, min(start + pairs_per_pass, pairs.count))
                batch = pairs.batch(indices).to(groups.device)
                rows = _gather(batch, source(batch), indices, groups)
                on_rank_zero(partial(writer.append, rows))
                bar.update(len(indices))
                if stop():
                    return False
        on_rank_zero(writer.finish)
    return True


def _gather(batch: GlobalBatch, logps: Sequence[Tensor], indices: range, groups: Groups) -> Rows:
    """The rows of all `indices`, on every rank.

    Each pair is on one data-parallel rank, and its log-probs are on the last pipeline stage; elsewhere stand zeros.
    """
    # [pairs, responses, columns]. fp64 holds fp32 log-probs and numbers of tokens exactly, and adding zeros keeps them.
    columns = torch.zeros(len(indices), 2, 2, dtype=torch.float64, device=groups.device)
    for micro_batch, summed in zip(batch, logps, strict=False):  # no log-probs but on the last stage
        responses = torch.stack([summed.double(), micro_batch.response_tokens.double()], dim=-1)
        columns[micro_batch.pair_index - indices.start] = responses[micro_batch.pair_segments]
    dist.all_reduce(columns, group=groups.dp)
    groups.broadcast_from_last_stage(columns)
    rows = np.empty(len(indices), ROW)
    rows["logps"], rows["tokens"] = columns.cpu().numpy().transpose(2, 0, 1)
    return rows


def _progress_bar(split: str, done: int, pairs: int, rank: int) -> tqdm[Any]:
    """With the time left, on rank 0; in a log file a line every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    description = f"reference log-probs of {split}"
    return tqdm(total=pairs, initial=done, desc=description, unit="pair", mininterval=interval, disable=rank != 0)
