"""Functions for `run_cli(patches=…)` that watch or break a run with cached reference log-probs."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.cli.probes import log_dir, wrap

ROWS_BEFORE_THE_KILL = 16


def read_passes(folder: Path) -> list[list[Any]]:
    """[split, sorted pair indices over all ranks] of each reference pass of a run under `watch_passes`."""
    by_pass: dict[int, tuple[str, set[int]]] = {}
    for file in folder.glob("passes/*.jsonl"):
        for number, line in enumerate(file.read_text().splitlines()):
            split, pairs = json.loads(line)
            by_pass.setdefault(number, (split, set()))[1].update(pairs)
    return [[split, sorted(pairs)] for _, (split, pairs) in sorted(by_pass.items())]


def watch_passes() -> None:
    """Leave passes/<rank>.jsonl: split and pair indices of this rank in each forward pass that collects log-probs."""
    from nemo_dpo.parallel.engine import Evaluator
    from nemo_dpo.parallel.response import collect_logps
    from nemo_dpo.reference import cached

    splits: list[str] = []

    def filled(fill: Any, folder: Path, *args: Any) -> bool:
        splits.append(folder.name)
        return fill(folder, *args)

    def passed(run: Any, engine: Evaluator, micro_batches: Any, step: Any) -> Any:
        if step is collect_logps:
            pairs = [pair for batch in micro_batches for pair in batch.pair_index.tolist()]
            folder = log_dir() / "passes"
            folder.mkdir(exist_ok=True)
            with (folder / f"{os.environ['RANK']}.jsonl").open("a") as file:
                file.write(json.dumps([splits[-1] if splits else "", pairs]) + "\n")
        return run(engine, micro_batches, step)

    wrap(cached, "_fill_split", filled)
    wrap(Evaluator, "forward_only", passed)


def kill_half_way() -> None:
    """The writer is killed in the middle of a row, when ROWS_BEFORE_THE_KILL are written."""
    from nemo_dpo.reference.table import ROW, TableWriter

    def append(write: Any, writer: TableWriter, rows: Any) -> None:
        assert writer._file is not None
        if writer._file.tell() == ROWS_BEFORE_THE_KILL * ROW.itemsize:
            writer._file.write(rows.tobytes()[: ROW.itemsize - 5])
            writer._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(writer, rows)

    wrap(TableWriter, "append", append)


def stop_half_way() -> None:
    """SIGTERM reaches every rank while the first rows are written."""
    from nemo_dpo.reference import cached

    def gather(collect: Any, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return collect(*args)

    wrap(cached, "_gather", gather)


def slow_passes() -> None:
    """Computing reference log-probs takes a second a global batch."""
    from nemo_dpo.reference import cached

    def gather(collect: Any, *args: Any) -> Any:
        time.sleep(1)
        return collect(*args)

    wrap(cached, "_gather", gather)


def weigh_tensors() -> None:
    """Leave tensors.json: bytes of all live tensors at the start of the second step, of parameters, of trained ones."""
    import torch

    from nemo_dpo.training.module import PreferenceModule

    def step(train: Any, module: Any, batch: Any, number: int) -> None:
        if module.trainer.global_step == 1:
            tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
            parameters = [p for chunk in module.engine.chunks for p in chunk.parameters()]
            facts = {
                "live": sum(storages.values()),
                "parameters": sum(p.nbytes for p in parameters),
                "trained": sum(p.nbytes for p in parameters if p.requires_grad),
            }
            (log_dir() / "tensors.json").write_text(json.dumps(facts))
        train(module, batch, number)

    wrap(PreferenceModule, "training_step", step)
