"""What a rank of a few does in tests/training/test_signals.py."""

from __future__ import annotations

import torch

from nemo_dpo.training import signals
from nemo_dpo.training.leave import Stop, TimeLimit, any_request


def what_all_answer(rank: int, noted: list[list[int]], over: list[bool]) -> Stop | None:
    """With these signals noted on each rank, and the time over on some."""
    signals._noted = set(noted[rank])
    return any_request(TimeLimit("0:0:0:0" if over[rank] else None), torch.device("cpu"))
