"""For `run_cli(patches=…)`: what a run made of every pair that it trained on, as its own micro-batches have it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

Pair = dict[str, Any]


def read_pairs(log_dir: Path) -> dict[int, Pair]:
    """Index of the pair → its log-probs and tokens, from all ranks of a run under `record_pairs`."""
    lines = [line for file in sorted(log_dir.glob("pairs_*.jsonl")) for line in file.read_text().splitlines()]
    return {pair["index"]: pair for pair in map(json.loads, lines)}


def record_pairs() -> None:
    """Each rank that has the loss appends one line a training pair to pairs_<rank>.jsonl in the results folder."""
    from nemo_dpo.training import step

    original = step.pair_stats

    def recorded(batch: Any, logps: torch.Tensor, ref_logps: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            _append([_pair(batch, number, logps, ref_logps) for number in range(batch.num_pairs)])
        return original(batch, logps, ref_logps)

    step.pair_stats = recorded


def _append(pairs: list[Pair]) -> None:
    key = "exp_manager.explicit_log_dir="
    folder = Path(next(word.removeprefix(key) for word in sys.argv if word.startswith(key)))
    # Several ranks of one tensor parallel group have the same pairs: the last one read counts.
    with (folder / f"pairs_{os.environ['RANK']}.jsonl").open("a") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)


def _pair(batch: Any, number: int, logps: torch.Tensor, ref_logps: torch.Tensor) -> Pair:
    sides = batch.pair_segments[number].tolist()
    chosen, rejected = (_tokens(batch, side) for side in sides)
    return {
        "index": int(batch.pair_index[number]),
        "logps": [float(logps[side]) for side in sides],
        "ref_logps": [float(ref_logps[side]) for side in sides],
        "prompt_ids": [chosen[0], rejected[0]],
        "response_ids": [chosen[1], rejected[1]],
    }


def _tokens(batch: Any, response: int) -> tuple[list[int], list[int]]:
    """Prompt and response of one response: what stands before its first target, and its targets."""
    mine = batch.response_segment == response
    row, first = divmod(int(batch.response_positions[mine].min()), batch.tokens.shape[1])
    return batch.tokens[row, : first + 1].tolist(), batch.targets[mine].tolist()
