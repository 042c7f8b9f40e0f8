"""The tokens of one data file on disk: written once, under a temporary name, and memory-mapped by every rank.

A folder holds `ids.bin` (int32: prompt, chosen, rejected of one pair after the other), `pairs.bin` (one `PAIR` record
each) and `meta.json` (sizes, fingerprint, the tally of the lines). Its name is a hash of everything that decides its
content, so that it is right whenever it exists; and it exists only whole, as it is renamed into place after fsync.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemo_dpo.data.tally import Counts, Tally
from nemo_dpo.data.tokenize import TokenTriple
from nemo_dpo.data.types import DataError, PreferencePair, TokenIds

FORMAT = 1
ID = np.dtype("<i4")
PAIR = np.dtype(
    [
        ("start", "<i8"),  # where the prompt begins in ids.bin, in tokens
        ("line", "<i8"),  # line of the data file, from 1
        ("lengths", "<i4", 3),  # tokens of prompt, chosen, rejected
        ("rewards", "<f8", 2),  # ground truth of chosen, rejected
    ]
)

Chunk = Sequence[tuple[PreferencePair, TokenTriple]]


@dataclass(frozen=True)
class Meta:
    """Sizes of a store, the hash of its tokens (ids and lengths), and what happened to the file's lines."""

    pairs: int
    tokens: int
    fingerprint: str
    tally: Tally


@dataclass(frozen=True)
class Store:
    """An open store; the arrays are read-only memory maps, shared by all processes of a machine."""

    ids: TokenIds
    pairs: npt.NDArray[np.void]
    meta: Meta


def open_store(folder: Path) -> Store:
    """Map a finished store. Raises DataError if files are missing or have another size than was written."""
    meta = read_meta(folder)
    for name, size in (("ids.bin", meta.tokens * ID.itemsize), ("pairs.bin", meta.pairs * PAIR.itemsize)):
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path}: not the {size} bytes that were written; delete {folder} to tokenise again")
    return Store(
        ids=np.memmap(folder / "ids.bin", dtype=ID, mode="r"),
        pairs=np.memmap(folder / "pairs.bin", dtype=PAIR, mode="r"),
        meta=meta,
    )


def read_meta(folder: Path) -> Meta:
    """Read meta.json. Raises DataError if it is missing or not what `write_store` writes."""
    path = folder / "meta.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        tally = Tally(**{name: Counts(**counts) for name, counts in raw.pop("tally").items()})
        return Meta(**raw, tally=tally)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete {folder} to tokenise again") from error


def write_store(folder: Path, produce: Callable[[Tally], Iterable[Chunk]]) -> None:
    """Write the chunks of `produce`, which fills the tally it is given, into a new `folder`.

    Where another process has finished the same folder meanwhile, that one is kept. Nothing is left behind on an
    error; a killed process leaves a folder `*.tmp-<host>-<pid>`, which nothing opens and anyone may delete.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tally = Tally()
        pairs, tokens, fingerprint = _write_arrays(temporary, produce(tally))
        meta = asdict(Meta(pairs, tokens, fingerprint, tally))
        _write_synced(temporary / "meta.json", [json.dumps(meta, indent=1).encode()])
        _sync_folder(temporary)
        _rename(temporary, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_arrays(folder: Path, chunks: Iterable[Chunk]) -> tuple[int, int, str]:
    """Write ids.bin and pairs.bin chunk by chunk; return pairs, tokens, fingerprint."""
    tokens = pairs = 0
    ids_hash, lengths_hash = hashlib.sha256(), hashlib.sha256()
    with (folder / "ids.bin").open("wb") as ids_file, (folder / "pairs.bin").open("wb") as pairs_file:
        for chunk in chunks:
            ids = np.fromiter(chain.from_iterable(chain.from_iterable(triple for _, triple in chunk)), dtype=ID)
            records = _records(chunk, tokens)
            ids_file.write(ids.data)
            pairs_file.write(records.tobytes())
            ids_hash.update(ids.data)
            lengths_hash.update(records["lengths"].tobytes())
            tokens += len(ids)
            pairs += len(chunk)
        for file in (ids_file, pairs_file):
            file.flush()
            os.fsync(file.fileno())
    return pairs, tokens, hashlib.sha256(ids_hash.digest() + lengths_hash.digest()).hexdigest()


def _records(chunk: Chunk, start: int) -> npt.NDArray[np.void]:
    """The PAIR records of a chunk whose first token is number `start` of ids.bin."""
    records = np.empty(len(chunk), PAIR)
    lengths = np.array([[len(ids) for ids in triple] for _, triple in chunk], dtype=np.int64).reshape(-1, 3)
    records["lengths"] = lengths
    ends = start + np.cumsum(lengths.sum(axis=1))
    records["start"] = ends - lengths.sum(axis=1)
    records["line"] = [pair.line for pair, _ in chunk]
    rewards = [(pair.chosen_reward, pair.rejected_reward) for pair, _ in chunk]
    records["rewards"] = np.array(rewards, dtype=np.float64).reshape(-1, 2)
    return records


def _write_synced(path: Path, blocks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # not a rival that was faster
            raise
