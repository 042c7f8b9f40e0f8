"""Data files → a split that every rank can open.

One rank calls `prepare_split`, which tokenises what the cache does not hold yet and returns a small, picklable
description; the others receive it and call `open_split`. Nothing grows with the data but files and their mappings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nemo_dpo.data.blend import blend, blend_counts
from nemo_dpo.data.jsonl import Source, read_pairs
from nemo_dpo.data.store import FORMAT, Chunk, Store, open_store, read_meta, write_store
from nemo_dpo.data.tally import Tally
from nemo_dpo.data.tokenize import Tokenizer, tokenize_pairs
from nemo_dpo.data.types import DataError, DataOptions, PreferencePair, TokenPair

logger = logging.getLogger(__name__)

# A call of the tokenizer gets at most this many pairs or, for long texts, about this many characters.
CHUNK_PAIRS = 512
CHUNK_CHARACTERS = 500_000
# Rows of an index that are looked at together, so that what is computed on the way stays small.
GATHERED_ROWS = 65_536
# Smaller files are done before a progress bar could be read.
BAR_FROM_BYTES = 4_000_000


@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of the store in `folder`, made from `file`. Paths are texts, to be sent to other ranks."""

    folder: str
    file: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PreparedSplit:
    """What `open_split` needs: the shards, and their weights where they are blended rather than concatenated."""

    shards: tuple[Shard, ...]
    weights: tuple[float, ...] | None

    @property
    def pairs_per_shard(self) -> list[int]:
        """Pairs of the split that come from each shard; repeated ones count as often as they come."""
        sizes = [shard.size for shard in self.shards]
        return sizes if self.weights is None else blend_counts(sizes, self.weights)


def prepare_split(
    files: Sequence[Path],
    weights: Sequence[float] | None,
    tokenizer: Tokenizer,
    options: DataOptions,
    cache_dir: Path,
    spans: Sequence[tuple[float, float]] | None = None,
    between_chunks: Callable[[], object] = lambda: None,
) -> PreparedSplit:
    """Tokenise `files` into `cache_dir`, as far as it does not hold them, and describe the split.

    Without weights the files follow one another, each pair once; with weights see `nemo_dpo.data.blend.blend`. `spans`
    gives the part of each file's pairs that belongs to the split, as fractions [start, end): each file is cut before
    blending, so that a pair which weights repeat cannot be in two splits. One process per run calls this; runs that
    share cache_dir do not disturb each other. What `between_chunks` raises ends the work; files that are done stay so.
    Raises DataError for a file that cannot be read, is not the format or
    keeps no pair.
    """
    if not files:
        raise DataError("no data file given: set model.data.data_prefix")
    whole = [_prepare_file(Path(file), tokenizer, options, Path(cache_dir), between_chunks) for file in files]
    shards = [_cut(shard, span) for shard, span in zip(whole, spans or [(0.0, 1.0)] * len(whole), strict=True)]
    if weights is not None:
        blend_counts([shard.size for shard in shards], weights)  # refuses bad weights here, not on every rank
    return PreparedSplit(tuple(shards), None if weights is None else tuple(weights))


def _cut(shard: Shard, span: tuple[float, float]) -> Shard:
    """The rows of a whole file's shard that a span names; spans that meet leave out no row and share none."""
    start, stop = (round(end * shard.size) for end in span)
    if start >= stop:
        raise DataError(f"{shard.file}: a share of {span[1] - span[0]:.3g} leaves none of its {shard.size} pairs")
    return replace(shard, start=start, stop=stop)


def _prepare_file(
    file: Path, tokenizer: Tokenizer, options: DataOptions, cache_dir: Path, between_chunks: Callable[[], object]
) -> Shard:
    before = _state(file)
    folder = (cache_dir / f"pairs-{_key(file, tokenizer, options)}").absolute()

    def produce(tally: Tally) -> Iterator[Chunk]:
        yield from _tokenize_file(file, tokenizer, options, tally, between_chunks)
        if _state(file) != before:
            raise DataError(f"{file}: changed while it was read; start again when it is complete")

    if folder.is_dir():
        logger.info("%s: tokens found in %s", file, folder)
    else:
        logger.info("%s: tokenising %.1f MB into %s", file, before[0] / 1e6, folder)
        try:
            write_store(folder, produce)
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be written ({error}); set model.data.cache_dir to another place"
            ) from error
    meta = read_meta(folder)
    if meta.pairs == 0:
        reasons = ", ".join(f"{number} × {reason}" for reason, number, _ in meta.tally.dropped)
        raise DataError(f"{file}: no pair is left to train on ({reasons})")
    return Shard(str(folder), str(file), 0, meta.pairs)


def _key(file: Path, tokenizer: Tokenizer, options: DataOptions) -> str:
    """Hash of all that decides the tokens of a file: its content, not its name or date."""
    try:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    parts = {
        "format": FORMAT,
        "content": content,
        "tokenizer": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id if options.append_eod else None,
        "options": asdict(options),
        "ftfy": metadata.version("ftfy") if options.apply_ftfy else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _state(file: Path) -> tuple[int, int]:
    """Size and date, to notice a change. Raises DataError if there is no such file."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; set model.data.data_prefix to jsonl files")
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _tokenize_file(
    file: Path, tokenizer: Tokenizer, options: DataOptions, tally: Tally, between_chunks: Callable[[], object]
) -> Iterator[Chunk]:
    """The kept pairs of a file with their tokens, chunk by chunk, under a progress bar over the file's bytes."""
    size = file.stat().st_size
    quiet = size < BAR_FROM_BYTES or not sys.stderr.isatty()
    with (
        file.open("rb") as stream,
        tqdm(total=size, desc=f"tokenising {file.name}", unit="B", unit_scale=True, disable=quiet) as bar,
    ):
        for pairs in _chunks(read_pairs(stream, str(file), options, tally.noted)):
            yield list(tokenize_pairs(pairs, tokenizer, options, str(file), tally))
            bar.update(stream.tell() - bar.n)
            between_chunks()


def _chunks(pairs: Iterator[PreferencePair]) -> Iterator[list[PreferencePair]]:
    chunk: list[PreferencePair] = []
    characters = 0
    for pair in pairs:
        chunk.append(pair)
        characters += 2 * len(pair.prompt) + len(pair.chosen_response) + len(pair.rejected_response)
        if len(chunk) == CHUNK_PAIRS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def open_split(prepared: PreparedSplit) -> PairDataset:
    """Map a prepared split; any number of processes may. Raises DataError if its cache is gone or damaged."""
    return PairDataset(prepared)


class PairDataset:
    """The pairs of a split by index. Picklable (it is opened anew) and safe to fork (the maps are read-only)."""

    def __init__(self, prepared: PreparedSplit) -> None:
        self.prepared = prepared
        self._stores: list[Store] = [open_store(Path(shard.folder)) for shard in prepared.shards]
        sizes = [shard.size for shard in prepared.shards]
        self._ends = list(accumulate(sizes))
        self._order = None if prepared.weights is None else blend(sizes, prepared.weights)

    def __reduce__(self) -> tuple[Callable[[PreparedSplit], PairDataset], tuple[PreparedSplit]]:
        return open_split, (self.prepared,)

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[TokenPair]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> TokenPair:
        shard, row = self._locate(index)
        record = self._stores[shard].pairs[row]
        prompt, chosen, rejected = (int(length) for length in record["lengths"])
        start = int(record["start"])
        ids = np.array(self._stores[shard].ids[start : start + prompt + chosen + rejected])
        chosen_reward, rejected_reward = (float(reward) for reward in record["rewards"])
        return TokenPair(
            index=index,
            prompt_ids=ids[:prompt],
            chosen_ids=ids[prompt : prompt + chosen],
            rejected_ids=ids[prompt + chosen :],
            chosen_reward=chosen_reward,
            rejected_reward=rejected_reward,
        )

    def source(self, index: int) -> Source:
        """File and line that a pair comes from."""
        shard, row = self._locate(index)
        return Source(self.prepared.shards[shard].file, int(self._stores[shard].pairs[row]["line"]))

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens in the split's order: log-probs cached under it belong to these pairs."""
        shards = zip(self.prepared.shards, self._stores, strict=True)
        parts = [(store.meta.fingerprint, shard.start, shard.stop) for shard, store in shards]
        return hashlib.sha256(json.dumps([parts, self.prepared.weights]).encode()).hexdigest()

    @property
    def rewards_fingerprint(self) -> str:
        """Hash of the ground-truth rewards in the split's order, which `fingerprint` leaves out."""
        rewards = self._gather(lambda store, rows: store.pairs["rewards"][rows])
        return hashlib.sha256(rewards.tobytes()).hexdigest()

    @property
    def is_part(self) -> bool:
        """Whether the split leaves pairs of its files to other splits."""
        shards = zip(self.prepared.shards, self._stores, strict=True)
        return any(shard.size < store.meta.pairs for shard, store in shards)

    def tallies(self) -> list[tuple[str, Tally]]:
        """(file, tally) of each file, as a whole also where the split is a part of it."""
        return [(s.file, store.meta.tally) for s, store in zip(self.prepared.shards, self._stores, strict=True)]

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of prompt, chosen, rejected: [pairs, 3], in the split's order."""
        lengths: npt.NDArray[np.int32] = self._gather(lambda store, rows: store.pairs["lengths"][rows])
        return lengths

    def last_tokens(self) -> npt.NDArray[np.int32]:
        """The last token of chosen and of rejected: [pairs, 2]."""
        return self._gather(_last_tokens)

    def _gather(self, read: Callable[[Store, slice], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        shards = zip(self._stores, self.prepared.shards, strict=True)
        columns = np.concatenate(
            [
                read(store, slice(row, min(row + GATHERED_ROWS, shard.stop)))
                for store, shard in shards
                for row in range(shard.start, shard.stop, GATHERED_ROWS)
            ]
        )
        return columns if self._order is None else columns[self._order]

    def _locate(self, index: int) -> tuple[int, int]:
        """Shard, and row in its store, of a pair."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        position = index if self._order is None else int(self._order[index])
        shard = bisect_right(self._ends, position)
        return shard, self.prepared.shards[shard].stop - (self._ends[shard] - position)


def _last_tokens(store: Store, rows: slice) -> npt.NDArray[np.int32]:
    ends = store.pairs["start"][rows, None] + np.cumsum(store.pairs["lengths"][rows], axis=1)
    return np.asarray(store.ids[ends[:, 1:] - 1])
