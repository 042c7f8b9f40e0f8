"""A distributed checkpoint on its way to the disk: planned, written, completed, and only then given its name.

megatron-core plans who writes which tensor and writes a file of them. The rest of its saving is done here: every step
that may fail on one rank alone is heard by all (its own left the others in a collective when a disk was full), and
writing in the background is a fork of the rank, which dies with it and whose end is looked at. megatron-core's
persistent worker counts CUDA devices and would see host tensors change under training; its temporary one forks
writers that outlive a killed rank, waits for ever for one that is killed, and needs a second interpreter on every rank.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from nemo_dpo.checkpoint import SaveError, manifest
from nemo_dpo.checkpoint.folders import commit, free_bytes, unfinished
from nemo_dpo.checkpoint.weights import COMMON_FILE, FORMAT_FILE, METADATA
from nemo_dpo.one_line import one_line
from nemo_dpo.parallel.collective import agree, gather, gather_on_rank_zero, on_rank_zero
from nemo_dpo.parallel.processes import die_with

# What megatron-core and torch raise when they plan or write.
FAULTS = (OSError, RuntimeError, CheckpointingException, CheckpointException)
MIB = 2**20


@dataclass(frozen=True)
class Written:
    """What one rank has written.

    Attributes:
        results: where each tensor is, for the index.
        entries: of its files, for the manifest.
    """

    results: list[Any]
    entries: dict[str, manifest.Entry]


class Writing:
    """One checkpoint that is being written: the constructor plans, `finish` completes it. Both are collective.

    Args:
        folder: final name; an existing checkpoint there is replaced once the new one is complete.
        state: sharded tensors and objects, and what is the same on all ranks.
        texts: further files by name. With any, the checkpoint gets a manifest; archives of weights have none.
        background: write in a fork of this process, which keeps the state as it is now while the rank goes on; else
            the constructor writes, too.

    Raises:
        SaveError: there is no room for it, or it cannot be written; nothing is left behind.
    """

    def __init__(self, folder: Path, state: dict[str, Any], texts: Mapping[str, str], *, background: bool) -> None:
        self.folder = folder
        self.bytes = 0
        self._into = unfinished(folder)
        self._texts = texts
        self._planner = _Planner()
        self._fork: _Fork | None = None
        self._written = Written([], {})  # by this process itself
        self._started = time.monotonic()
        with self._whole_or_nothing():
            on_rank_zero(lambda: _make_empty(self._into))
            sharded, common = agree(lambda: save_preprocess(state))
            request = agree(lambda: self._planner.async_save(sharded, str(self._into)))
            on_rank_zero(partial(_check_room, folder.parent, sum(gather(_size(request)))))
            on_rank_zero(lambda: torch.save(common, self._into / COMMON_FILE))
            agree(lambda: self._write(request, background))
            self._planner.writer.write_buckets = None  # copies, of which the fork has its own
        self.blocked = time.monotonic() - self._started
        """Seconds that training has waited for this checkpoint."""

    def busy(self) -> bool:
        """Whether this rank is still being written for."""
        return self._fork is not None and self._fork.busy()

    def finish(self) -> None:
        """Wait for what is still being written, and give the checkpoint its name. Collective.

        Raises:
            SaveError: see the class; a predecessor of the same name is untouched.
        """
        start = time.monotonic()
        with self._whole_or_nothing():
            shares = gather_on_rank_zero(agree(lambda: self._fork.result() if self._fork else self._written))
            self.bytes = on_rank_zero(lambda: self._complete(shares))
        self.blocked += time.monotonic() - start

    @property
    def seconds(self) -> float:
        """Since it was begun."""
        return time.monotonic() - self._started

    def abandon(self) -> None:
        """Stop writing, for a run that ends by an error; the next start removes what is there."""
        if self._fork:
            self._fork.kill()

    def _write(self, request: AsyncRequest, background: bool) -> None:
        if request.async_fn is None:  # nothing to write on this rank
            return
        # Staged here, not in the fork, which must not touch a device.
        write = partial(_write, request.async_fn.args[0], request.preload_fn(), self._into)
        if background:
            self._fork = _Fork(write)
        else:
            self._written = write()

    def _complete(self, shares: list[Written]) -> int:
        self._planner.writer.finish(self._planner.metadata, [share.results for share in shares])
        save_config(CheckpointingConfig(self._planner.backend, self._planner.version), str(self._into))
        for name, text in self._texts.items():
            (self._into / name).write_text(text, encoding="utf-8")
        own = [self._into / name for name in (COMMON_FILE, METADATA, FORMAT_FILE, *self._texts)]
        entries = manifest.describe(own)
        for share in shares:
            entries |= share.entries
        if self._texts:
            manifest.write(self._into, entries)
        commit(self.folder)
        return manifest.total(entries)

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """What fails inside fails on every rank; then there is one error, and nothing under the temporary name."""
        try:
            yield
        except FAULTS as error:
            self.abandon()
            free = on_rank_zero(lambda: free_bytes(self.folder.parent) / MIB)
            if dist.get_rank() == 0:
                shutil.rmtree(self._into, ignore_errors=True)
            raise SaveError(
                f"could not write {self.folder}: {reason(error)} ({free:.1f} MiB were left on the disk). "
                "Earlier checkpoints are untouched; make space and start again"
            ) from error


class _Planner(TorchDistSaveShardedStrategy):
    """megatron-core's plan of a save, kept: writing and completing it are done here."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.writer: Any = None
        self.metadata: Any = None  # of all tensors; on rank 0
        # For this queue megatron-core would start an interpreter on every rank: 7 s and 500 MB. It stays empty.
        filesystem_async._results_queue = queue.SimpleQueue()

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned)


def _write(transforms: list[Any], buckets: list[Any], into: Path) -> Written:
    """Write this rank's files, each in a thread: writing and waiting for the disk release the interpreter."""
    with ThreadPoolExecutor(len(buckets)) as threads:
        results = threads.map(partial(_write_file, transforms), buckets)
        found = list(itertools.chain.from_iterable(results))
    return Written(found, manifest.describe(into / name for _, name, _ in buckets))


def _write_file(transforms: list[Any], bucket: Any) -> list[Any]:
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    count: queue.Queue[int] = queue.Queue()
    count.put(0)  # megatron-core takes it when it is done
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, count, use_fsync=True)
    _, found = results.get()
    if isinstance(found, Exception):
        raise found
    return list(found)


def _size(request: AsyncRequest) -> int:
    """Bytes of the tensors and objects that this rank writes."""
    if request.async_fn is None:
        return 0
    parts = [data for _, _, (objects, tensors) in request.async_fn_args[1] for _, data in [*objects, *tensors]]
    return sum(part.nbytes if isinstance(part, torch.Tensor) else part.getbuffer().nbytes for part in parts)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _check_room(folder: Path, needed: int) -> None:
    if (free := free_bytes(folder)) < needed:
        raise RuntimeError(f"it takes {needed / MIB:.1f} MiB, {(needed - free) / MIB:.1f} MiB more than are free")


class _Fork:
    """`action` in a fork of this process, with memory as it is now.

    A fork has none of the threads that torch computes with (OpenMP's): `action` may copy and write, and nothing that is
    done with several threads. `_write_file` runs in threads of Python's own, which are new.
    """

    def __init__(self, action: Callable[[], Written]) -> None:
        # What it found comes back through a file: a pipe would be full before anyone reads it.
        self._outcome = tempfile.TemporaryFile()  # noqa: SIM115  closed with this object
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._run, args=(os.getpid(), action), daemon=True)
        self._process.start()

    def _run(self, parent: int, action: Callable[[], Written]) -> None:
        die_with(parent)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # of a whole job: the rank acts on them
            signal.signal(number, signal.SIG_IGN)
        gc.disable()  # what it would delete is the rank's
        try:
            outcome: Written | str = action()
        except FAULTS as error:
            outcome = reason(error)
        pickle.dump(outcome, self._outcome)
        self._outcome.flush()

    def busy(self) -> bool:
        return self._process.is_alive()

    def result(self) -> Written:
        """Wait for it; RuntimeError if it failed, or was killed."""
        self._process.join()
        if self._process.exitcode:
            raise RuntimeError(f"the process that wrote it ended with status {self._process.exitcode}")
        self._outcome.seek(0)
        outcome = pickle.load(self._outcome)
        if isinstance(outcome, str):
            raise RuntimeError(outcome)
        return outcome  # type: ignore[no-any-return]

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def reason(error: BaseException) -> str:
    """What went wrong, in one line; of what torch reports of several ranks, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return one_line(error)
