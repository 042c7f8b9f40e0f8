"""Run by test_data_memory.py in processes of their own: how anonymous memory grows while data are prepared or read."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

from nemo_dpo.data import DataOptions, PairSampler, make_report, open_split, prepare_split


class EveryEighth:
    """Every eighth byte is a token: fast enough for a million lines, and prompts are prefixes."""

    eos_id = pad_id = 256
    fingerprint = "every eighth byte"

    def encode(self, text: str) -> list[int]:
        return list(text.encode()[::8])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return str(ids)


class Peak:
    """The largest RssAnon of this process, sampled, above what it was at the start."""

    def __init__(self) -> None:
        self.start = self.largest = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.largest = max(self.largest, anonymous_bytes())

    def __enter__(self) -> Peak:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    @property
    def growth_mb(self) -> float:
        return (max(self.largest, anonymous_bytes()) - self.start) / 1e6


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def rank_of_a_run(rank: int, file: Path, log_dir: Path) -> dict[str, Any]:
    """One of two data-parallel ranks: data prepared and reported, then an epoch and a validation by the loaders."""
    import torch

    from nemo_dpo.config.schema import Config, DataConfig, ModelConfig
    from nemo_dpo.parallel import cpu_host
    from nemo_dpo.parallel.groups import Layout, initialize
    from nemo_dpo.training.data import PairData

    cpu_host.install()
    groups = initialize(Layout(2), torch.device("cpu"), seed=1)
    prefix = {"train": [str(file)], "validation": [str(file)]}
    data = DataConfig(data_prefix=prefix, seq_length=4096, append_eod=True)
    cfg = Config(model=ModelConfig(global_batch_size=512, micro_batch_size=8, data=data))
    with Peak() as peak:
        prepared = PairData.prepare(cfg, {}, EveryEighth(), log_dir, groups)
        trained = sum(micro.num_pairs for batch in prepared.train_loader(lambda: 0) for micro in batch)
        validation = prepared.batches("validation")
        assert validation is not None
        validated = sum(micro.num_pairs for batch in validation for micro in batch)
    return {"trained": trained, "validated": validated, "growth_mb": peak.growth_mb}


def main(task: str, file: Path, cache: Path, hold: bool) -> None:
    """`hold` keeps what is read, to show that the probe would see it."""
    tokenizer, options = EveryEighth(), DataOptions(seq_length=4096, append_eod=True)
    if task == "prepare":
        with Peak() as peak:
            prepared = prepare_split([file], None, tokenizer, options, cache)
            held = list(file.open("rb")) if hold else []
            make_report("train", open_split(prepared), tokenizer, 4).render()
        print(json.dumps({"pairs": sum(prepared.pairs_per_shard), "held": len(held), "growth_mb": peak.growth_mb}))
        return
    prepared = prepare_split([file], None, tokenizer, options, cache)
    with Peak() as peak:
        dataset = open_split(prepared)
        sampler = PairSampler(len(dataset), 512, seed=1)
        tokens = sum(dataset[i].longest for step in range(sampler.steps_per_epoch) for i in sampler.batch(step))
    print(json.dumps({"pairs": len(dataset), "tokens": tokens, "growth_mb": peak.growth_mb}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), hold="hold" in sys.argv[4:])
