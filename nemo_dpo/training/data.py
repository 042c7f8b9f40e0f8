"""The splits of a run as global batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_dpo.config import Config, Source, data_sources
from nemo_dpo.data import jsonl
from nemo_dpo.data.batch import GlobalBatch, build_global_batch
from nemo_dpo.data.dataset import PairDataset, PreparedSplit, open_split, prepare_split
from nemo_dpo.data.report import make_report
from nemo_dpo.data.sampler import PairSampler, interval_in_steps, validation_batches
from nemo_dpo.data.tokenize import Tokenizer
from nemo_dpo.data.types import DataOptions
from nemo_dpo.parallel.collective import on_rank_zero
from nemo_dpo.parallel.groups import Groups
from nemo_dpo.reference.cached import Pairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batches(Dataset[GlobalBatch]):
    """Global batches by number, read and collated when asked for."""

    split: str
    dataset: PairDataset
    pairs_of: Callable[[int], Sequence[int]]
    length: int
    options: dict[str, Any]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> GlobalBatch:
        if not 0 <= number < self.length:
            raise IndexError(number)  # which also ends a for loop
        return build_global_batch(self.dataset, self.pairs_of(number), split=self.split, **self.options)


class PairData:
    """Tokenised splits, in the batches of this data-parallel rank.

    Attributes:
        sampler: the training order, the same on all ranks.
        max_steps: optimizer steps of the whole run.
        validation_interval: steps between validations.
    """

    def __init__(self, cfg: Config, prepared: dict[str, PreparedSplit], pad_id: int, groups: Groups) -> None:
        self._cfg = cfg
        self._datasets = {split: open_split(part) for split, part in prepared.items()}
        limits = cfg.trainer.dpo
        self.sampler = PairSampler(
            len(self._datasets["train"]),
            cfg.model.global_batch_size,
            cfg.model.seed,
            shuffle=cfg.model.data.shuffle,
            drop_last=cfg.model.data.drop_last,
            limit=limits.limit_train_batches,
        )
        steps = self.sampler.steps_per_epoch * limits.max_epochs
        self.max_steps = steps if limits.max_steps == -1 else min(steps, limits.max_steps)
        self.validation_interval = interval_in_steps(limits.val_check_interval, self.sampler.steps_per_epoch)
        self._options = _batch_options(cfg, pad_id, groups)

    @classmethod
    def prepare(
        cls,
        cfg: Config,
        model_config: dict[str, Any],
        tokenizer: Tokenizer,
        log_dir: Path,
        groups: Groups,
        between_chunks: Callable[[], object] = lambda: None,
    ) -> PairData:
        """Rank 0 tokenises what is not cached yet and prints the data report; all ranks map the result. Collective.

        What `between_chunks` raises on rank 0 is raised on all.
        """
        options = data_options(cfg, model_config)
        cache = Path(cfg.model.data.cache_dir) if cfg.model.data.cache_dir else log_dir / "data_cache"
        prepared = on_rank_zero(lambda: _prepare(data_sources(cfg), tokenizer, options, cache, between_chunks))
        data = cls(cfg, prepared, tokenizer.pad_id, groups)
        if groups.rank == 0:
            data._show_reports(tokenizer, log_dir)
        return data

    def train_loader(self, start: Callable[[], int]) -> DataLoader[GlobalBatch]:
        """All steps from `start()` on, which is asked when iteration begins: after a resume is restored."""
        batches = Batches("train", self._datasets["train"], self.sampler.batch, self.max_steps, self._options)
        # Its own generator: an iterator draws a seed, and the default one is dropout's, restored just before.
        generator = torch.Generator()
        return DataLoader(batches, batch_size=None, sampler=_StepsFrom(start, self.max_steps), generator=generator)

    def batches(self, split: str) -> Batches | None:
        """All pairs of `split` in file order, the ragged last batch included; None if there is no such split."""
        if split not in self._datasets:
            return None
        dataset = self._datasets[split]
        numbers = validation_batches(
            len(dataset), self._cfg.model.global_batch_size, self._cfg.trainer.dpo.limit_val_batches
        )
        return Batches(split, dataset, numbers.__getitem__, len(numbers), self._options)

    def pairs(self) -> dict[str, Pairs]:
        """Every pair of every split, for a pass over them in any order."""
        return {
            split: Pairs(
                len(dataset),
                dataset.fingerprint,
                partial(build_global_batch, dataset, split=split, **self._options),
            )
            for split, dataset in self._datasets.items()
        }

    def source(self, index: int) -> jsonl.Source:
        """File and line of a training pair."""
        return self._datasets["train"].source(index)

    def _show_reports(self, tokenizer: Tokenizer, log_dir: Path) -> None:
        for split, dataset in self._datasets.items():
            report = make_report(split, dataset, tokenizer, self._cfg.model.micro_batch_size)
            logger.info("%s", report.render())
            (log_dir / f"data_{split}.json").write_text(report.to_json() + "\n", encoding="utf-8")

    def position(self, step: int) -> dict[str, int]:
        """Where the data are after `step` updates."""
        return {
            "step": step,
            "epoch": self.sampler.epoch(step),
            "consumed_samples": self.sampler.consumed_pairs(step),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the training pairs and their order, and what the scores of checkpoints are measured on."""
        validation = self._datasets.get("validation")
        return {
            **({"validation_data": validation.fingerprint} if validation else {}),
            "train_data": self._datasets["train"].fingerprint,
            "train_rewards": self._datasets["train"].rewards_fingerprint,
            "train_pairs": len(self._datasets["train"]),
            "global_batch_size": self._cfg.model.global_batch_size,
            "seed": self._cfg.model.seed,
            "shuffle": self._cfg.model.data.shuffle,
            "steps_per_epoch": self.sampler.steps_per_epoch,
        }


class _StepsFrom(Sampler[int]):
    def __init__(self, start: Callable[[], int], stop: int) -> None:
        self._start = start
        self._stop = stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._start(), self._stop))

    def __len__(self) -> int:
        return self._stop  # Lightning counts the steps before a resume too


def data_options(cfg: Config, model_config: dict[str, Any]) -> DataOptions:
    """The keys of model.data that decide what a line becomes; the sequence length is the checkpoint's unless given."""
    data = cfg.model.data
    return DataOptions(
        seq_length=data.seq_length or int(model_config["encoder_seq_length"]),
        append_eod=data.append_eod,
        apply_ftfy=data.apply_ftfy,
        overlong=data.overlong,  # type: ignore[arg-type]  # checked by config.limits
        invalid=data.invalid,  # type: ignore[arg-type]
        default_chosen_reward=data.default_chosen_reward,
        default_rejected_reward=data.default_rejected_reward,
    )


def _prepare(
    sources: dict[str, list[Source]],
    tokenizer: Tokenizer,
    options: DataOptions,
    cache: Path,
    between_chunks: Callable[[], object],
) -> dict[str, PreparedSplit]:
    prepared = {}
    for split, files in sources.items():
        weights = [file.weight for file in files if file.weight is not None]
        spans = [file.span for file in files]
        paths = [file.path for file in files]
        prepared[split] = prepare_split(paths, weights or None, tokenizer, options, cache, spans, between_chunks)
    return prepared


def _batch_options(cfg: Config, pad_id: int, groups: Groups) -> dict[str, Any]:
    layout = groups.layout
    multiple = cfg.model.data.pad_length_to_multiple_of or 1
    return {
        "dp_rank": groups.dp.rank(),
        "dp_size": groups.dp.size(),
        "micro_batch_size": cfg.model.micro_batch_size,
        # The interleaved schedule wants the number of micro-batches to be a multiple of the stages.
        "microbatch_group": layout.pp if layout.vpp else 1,
        "pad_id": pad_id,
        "multiple": math.lcm(multiple, layout.tp if layout.sequence_parallel else 1),
        "uniform": layout.pp > 1,
    }
