"""What a split is made of, in one table: printed before training, because most bad runs begin with their data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dpo.data.dataset import PairDataset
from nemo_dpo.data.tally import EXAMPLES, Counts
from nemo_dpo.data.tokenize import Tokenizer

MOST_ENDINGS = 5


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens over the pairs of a split."""

    min: int
    median: float
    mean: float
    p95: float
    max: int


@dataclass(frozen=True)
class Finding:
    """Lines with one fate: how many, and the first few as file:line."""

    reason: str
    count: int
    examples: list[str]  # the file's name without its folder, unless two files share it


@dataclass(frozen=True)
class Cost:
    """Tokens that the model computes in one epoch of pairs in file order, in three layouts.

    padded: rows of a micro-batch padded to its longest sequence; packed: no padding; shared: no padding and each
    prompt once for both responses. response: tokens whose log-probs are needed.
    """

    micro_batch_size: int
    padded: int
    packed: int
    shared: int
    response: int


@dataclass(frozen=True)
class DataReport:
    """The figures of one split. `dropped`, `changed` and `noted` are about whole files, also where it is a part."""

    name: str
    part_of_files: bool
    pairs: int
    tokens: int  # of all sequences, prompt and response, without padding
    files: list[tuple[str, int]]  # file, pairs of the split that come from it
    lengths: dict[str, Lengths]
    dropped: list[Finding]
    changed: list[Finding]
    noted: list[Finding]
    endings: list[tuple[str, float]]  # text of a response's last token, share of the responses
    eos_share: float
    cost: Cost

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    def render(self) -> str:
        """The report as lines of text, at most about 120 columns wide."""
        found = [("dropped", self.dropped), ("changed", self.changed), ("noted", self.noted)]
        findings = [line for title, group in found for line in _finding_lines(title, group)]
        if findings and self.part_of_files:
            findings.insert(0, "  of the whole files, of which this split is a part:")
        lines = [
            f"{self.name}: {self.pairs:,} pairs, {self.tokens:,} tokens, {self.cost.response:,} of them in responses",
            *(f"  {file}  {pairs:,} pairs" for file, pairs in self.files),
            *findings,
            *self._length_lines(),
            *self._ending_lines(),
            *self._cost_lines(),
        ]
        return "\n".join(lines)

    def _length_lines(self) -> Iterator[str]:
        yield f"  {'tokens':<18}{'min':>8}{'median':>8}{'mean':>9}{'p95':>8}{'max':>8}"
        for name, it in self.lengths.items():
            yield f"    {name:<16}{it.min:>8,}{it.median:>8,.0f}{it.mean:>9,.1f}{it.p95:>8,.0f}{it.max:>8,}"

    def _ending_lines(self) -> Iterator[str]:
        endings = ", ".join(f"{json.dumps(text, ensure_ascii=False)} {share:.1%}" for text, share in self.endings)
        yield f"  responses end with  {endings}"
        if self.eos_share < 0.5:
            yield (
                f"    {self.eos_share:.1%} end with the end-of-text token: the model is not taught where to stop, "
                "unless model.data.append_eod=true adds it"
            )

    def _cost_lines(self) -> Iterator[str]:
        cost = self.cost
        yield f"  computed tokens per epoch in file order, micro_batch_size {cost.micro_batch_size}"
        for name, tokens in (("padded", cost.padded), ("packed", cost.packed), ("shared prompts", cost.shared)):
            saved = f"{tokens / cost.padded - 1:>+8.0%}" if tokens != cost.padded else ""
            yield f"    {name:<16}{tokens:>14,}{saved}"


def make_report(name: str, dataset: PairDataset, tokenizer: Tokenizer, micro_batch_size: int) -> DataReport:
    """The report of an open split; reads the index and each response's last token, not the other tokens."""
    lengths = dataset.lengths()
    prompt, chosen, rejected = lengths.T
    cost = _cost(lengths, micro_batch_size)
    ids, counts = np.unique(dataset.last_tokens(), return_counts=True)
    most = np.argsort(-counts, kind="stable")[:MOST_ENDINGS]
    tallies = dataset.tallies()
    files = [shard.file for shard in dataset.prepared.shards]
    return DataReport(
        name=name,
        part_of_files=dataset.is_part,
        pairs=len(dataset),
        tokens=cost.packed,
        files=list(zip(files, dataset.prepared.pairs_per_shard, strict=True)),
        lengths={
            "prompt": _lengths(prompt),
            "chosen": _lengths(chosen),
            "rejected": _lengths(rejected),
            "longer sequence": _lengths(prompt + np.maximum(chosen, rejected)),
        },
        dropped=_findings([(file, tally.dropped) for file, tally in tallies]),
        changed=_findings([(file, tally.changed) for file, tally in tallies]),
        noted=_findings([(file, tally.noted) for file, tally in tallies]),
        endings=[(tokenizer.decode([int(ids[i])]), float(counts[i] / counts.sum())) for i in most],
        eos_share=float(counts[ids == tokenizer.eos_id].sum() / counts.sum()),
        cost=cost,
    )


def _lengths(tokens: npt.NDArray[Any]) -> Lengths:
    median, p95 = np.percentile(tokens, [50, 95])
    return Lengths(int(tokens.min()), float(median), float(tokens.mean()), float(p95), int(tokens.max()))


def _cost(lengths: npt.NDArray[np.int32], micro_batch_size: int) -> Cost:
    prompt, chosen, rejected = lengths.T
    longest = prompt + np.maximum(chosen, rejected)
    starts = np.arange(0, len(longest), micro_batch_size)
    rows = 2 * np.diff(starts, append=len(longest))
    response = int((chosen + rejected).sum(dtype=np.int64))
    prompts = int(prompt.sum(dtype=np.int64))
    return Cost(
        micro_batch_size=micro_batch_size,
        padded=int((rows * np.maximum.reduceat(longest, starts)).sum()),
        packed=2 * prompts + response,
        shared=prompts + response,
        response=response,
    )


def _findings(tallies: list[tuple[str, Counts]]) -> list[Finding]:
    """Join the counts of all files, most frequent reason first. A file listed twice counts once."""
    by_file = dict(tallies)
    names = [Path(file).name for file in by_file]
    found: dict[str, Finding] = {}
    for file, counts in by_file.items():
        label = Path(file).name if names.count(Path(file).name) == 1 else file
        for reason, number, lines in counts:
            before = found.get(reason, Finding(reason, 0, []))
            examples = before.examples + [f"{label}:{line}" for line in lines]
            found[reason] = Finding(reason, before.count + number, examples[:EXAMPLES])
    return sorted(found.values(), key=lambda finding: (-finding.count, finding.reason))


def _finding_lines(title: str, findings: list[Finding]) -> Iterator[str]:
    for finding in findings:
        more = ", …" if finding.count > len(finding.examples) else ""
        yield f"  {title:<8}{finding.count:>8,}  {finding.reason}  ({', '.join(finding.examples)}{more})"
