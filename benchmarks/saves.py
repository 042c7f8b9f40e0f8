#!/usr/bin/env python3
"""What a checkpoint costs: seconds that training waits for one, written by the rank or in the background; checksums.

    python benchmarks/saves.py --nemo mcore_gpt.nemo --pairs pairs.jsonl

One run of train_gpt_dpo as one process saves after every fourth step, every other time in the background, so that both
kinds meet the same load. The figures go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAVES = 6  # of each kind
SETTING = (
    "trainer.accelerator=cpu",
    f"trainer.dpo.max_steps={8 * SAVES}",
    "trainer.dpo.max_epochs=1000",
    "trainer.dpo.val_check_interval=1000000",
    "trainer.dpo.limit_val_batches=1",
    "trainer.dpo.save_interval=4",
    "model.micro_batch_size=4",
    "model.global_batch_size=4",
    "exp_manager.create_tensorboard_logger=false",
    "exp_manager.checkpoint_callback_params.async_save=true",
    "exp_manager.checkpoint_callback_params.save_top_k=0",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false",
    "exp_manager.plot_on_train_end=false",
)
CHECKSUMS: dict[str, Callable[[bytes], object]] = {
    "crc32": zlib.crc32,
    "adler32": zlib.adler32,
    "sha1": lambda data: hashlib.sha1(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
}


class Notes(logging.Handler):
    """What the trainer logs of each save: name, MiB, seconds, seconds that training waited."""

    def __init__(self) -> None:
        super().__init__()
        self.saves: list[tuple[str, float, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("saved %s"):
            self.saves.append(record.args)  # type: ignore[arg-type]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nemo", required=True, type=Path, help="the model")
    parser.add_argument("--pairs", required=True, type=Path, help="preference pairs, jsonl")
    parser.add_argument("--output", type=Path, help="default: saves_<date>.json in benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    today = datetime.date.today().isoformat()
    output = args.output or ROOT / "benchmarks" / "results" / f"saves_{today}.json"
    checksums = {name: round(speed(function), 2) for name, function in CHECKSUMS.items()}
    with tempfile.TemporaryDirectory() as folder:
        saves = alternated(args.nemo.resolve(), args.pairs.resolve(), Path(folder))
        versions = json.loads((Path(folder) / "run" / "versions.json").read_text(encoding="utf-8"))
    kinds = {"by the rank": saves[0::2], "in the background": saves[1::2]}
    waited = {kind: statistics.median(save[3] for save in own) for kind, own in kinds.items()}
    facts = {
        "date": today,
        "command": f"python benchmarks/saves.py --nemo {args.nemo.name} --pairs {args.pairs.name}",
        **versions,
        "setting": SETTING,
        "checksums_gb_per_s": checksums,
        "checkpoint_mib": round(saves[0][1], 1),
        "median_seconds_waited": {kind: round(value, 3) for kind, value in waited.items()},
        "median_seconds_to_the_end": {
            kind: round(statistics.median(save[2] for save in own), 3) for kind, own in kinds.items()
        },
        "waited_by_rank_over_background": round(waited["by the rank"] / waited["in the background"], 1),
        "saves": [{"seconds": round(save[2], 3), "waited": round(save[3], 3)} for save in saves],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: facts[name] for name in ("checksums_gb_per_s", "median_seconds_waited")}, indent=1))
    return 0


def alternated(nemo: Path, pairs: Path, log_dir: Path) -> list[tuple[str, float, float, float]]:
    """The saves of the run, those by the rank first."""
    from nemo_dpo.checkpoint import sharded
    from nemo_dpo.launch import main as launch

    begin, numbers, notes = sharded.save, itertools.count(), Notes()

    def save(*arguments: Any, background: bool) -> Any:
        return begin(*arguments, background=background and next(numbers) % 2 == 1)

    sharded.save = save
    logging.getLogger("nemo_dpo.training.cadence").addHandler(notes)
    words = [
        f"pretrained_checkpoint.restore_from_path='{nemo}'",
        f"model.data.data_prefix={{train: ['{pairs}'], validation: ['{pairs}']}}",
        f"exp_manager.explicit_log_dir='{log_dir}'",
        *SETTING,
    ]
    sys.argv = ["train_gpt_dpo.py", *words]
    if status := launch(ROOT / "conf", "gpt_dpo", "train", words):
        sys.exit(status)
    return notes.saves


def speed(function: Callable[[bytes], object]) -> float:
    """GB/s of one core, the best of three."""
    data = os.urandom(2**26)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        function(data)
        seconds.append(time.perf_counter() - start)
    return len(data) / min(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(main())
