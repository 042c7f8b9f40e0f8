"""Learning-rate schedules: NeMo's cosine against its formula written out, the others against transformers, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim import SGD

from nemo_dpo.config.schema import OptimConfig, SchedConfig
from nemo_dpo.training.lr import build_scheduler

LR, MIN_LR = 8e-4, 1e-4
# warmup_steps, constant_steps, max_steps
COSINES = [
    (0, 0, 12),
    (3, 0, 12),
    (0, 4, 12),
    (3, 4, 12),
    (5, 1, 6),  # nothing is left to decay
    (10, 1000, 20),  # the defaults in a short run: min_lr from the end of the warm-up on
    (10, 1000, 5),  # it ends while warming up
]


def rates(steps: int, max_steps: int, lr: float = LR, first: int = 0, **sched: Any) -> list[float]:
    """The rate that each of the updates `first` … `steps` − 1 is made with."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler = build_scheduler(optimizer, OptimConfig(lr=lr, sched=SchedConfig(**sched)), first, max_steps)
    found = []
    for _ in range(first, steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def nemo_cosine(step: int, warmup: int, constant: int, max_steps: int) -> float:
    """NeMo's CosineAnnealing: with constant_steps it is Megatron-LM's, without it warms up from lr / (warmup + 1)."""
    decay = max_steps - warmup - constant
    if step <= warmup and warmup:
        return LR * step / warmup if constant else LR * (step + 1) / (warmup + 1)
    if step > warmup + decay or step > max_steps:
        return MIN_LR
    share = (step - warmup) / decay
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(("warmup", "constant", "max_steps"), COSINES)
def test_cosine(warmup: int, constant: int, max_steps: int) -> None:
    expected = [nemo_cosine(step, warmup, constant, max_steps) for step in range(max_steps)]
    settings = {"name": "CosineAnnealing", "min_lr": MIN_LR, "warmup_steps": warmup, "constant_steps": constant}
    assert rates(max_steps, max_steps, **settings) == pytest.approx(expected, rel=1e-12, abs=0)


def test_cosine_by_hand() -> None:
    """lr 1, min_lr 0.2: up in 2 steps, down in 4 (cos 0, 45, 90, 135, 180 degrees), at min_lr for the last 3."""
    settings = {"name": "CosineAnnealing", "min_lr": 0.2, "warmup_steps": 2, "constant_steps": 3}
    half = math.sqrt(0.5)
    expected = [0, 0.5, 1, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half, 0.2, 0.2, 0.2]
    assert rates(9, 9, lr=1.0, **settings) == pytest.approx(expected)


def test_cosine_without_constant_steps_begins_above_zero() -> None:
    settings = {"name": "CosineAnnealing", "min_lr": 0.0, "warmup_steps": 3, "constant_steps": 0}
    assert rates(5, 7, lr=1.0, **settings) == pytest.approx([0.25, 0.5, 0.75, 1.0, (2 + math.sqrt(2)) / 4])


def test_linear_by_hand() -> None:
    """Up in 2 steps, down to min_lr in 4; the step after the last would have min_lr itself."""
    found = rates(7, 6, lr=1.0, name="linear", warmup_steps=2, min_lr=0.2)
    assert found == pytest.approx([0, 0.5, 1, 0.8, 0.6, 0.4, 0.2])


def test_constant_by_hand() -> None:
    """min_lr is no floor of a rate that does not decay."""
    assert rates(5, 5, lr=1.0, name="constant", warmup_steps=2, min_lr=0.2) == pytest.approx([0, 0.5, 1, 1, 1])
    assert rates(3, 3, lr=1.0, name="constant", warmup_steps=0) == [1, 1, 1]


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("constant", "constant_with_warmup")])
def test_transformers_computes_the_same(ours: str, theirs: str, warmup: int) -> None:
    from transformers import get_scheduler

    optimizer = SGD([torch.nn.Parameter(torch.zeros(()))], lr=LR)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(10, 10, name=ours, warmup_steps=warmup, min_lr=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["CosineAnnealing", "linear", "constant"])
@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.25, 12, 3), (0.3, 12, 3), (0.0, 12, 0), (0.05, 12, 0)])
def test_warmup_ratio_is_a_share_of_all_steps_rounded_down(name: str, ratio: float, steps: int, warmup: int) -> None:
    """As NeMo has it (transformers rounds up)."""
    common = {"name": name, "min_lr": MIN_LR, "constant_steps": 2}
    by_ratio = rates(steps, steps, warmup_steps=None, warmup_ratio=ratio, **common)
    assert by_ratio == rates(steps, steps, warmup_steps=warmup, **common)


@pytest.mark.parametrize("first", range(1, 13))
@pytest.mark.parametrize(
    ("name", "warmup", "constant"),
    [("CosineAnnealing", 3, 4), ("CosineAnnealing", 3, 0), ("linear", 3, 4), ("constant", 3, 4)],
)
def test_begun_in_its_middle_it_goes_on_as_if_it_had_begun_at_0(
    name: str, warmup: int, constant: int, first: int
) -> None:
    settings = {"name": name, "min_lr": MIN_LR, "warmup_steps": warmup, "constant_steps": constant}
    assert rates(12, 12, first=first, **settings) == rates(12, 12, **settings)[first:]


AT_ONCE = (
    "the run has 12 steps, not more than warm-up (2) and model.optim.sched.constant_steps=1000 together: right after "
    "the warm-up the learning rate is min_lr=9e-07; set constant_steps=0"
)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"warmup_steps": 2, "constant_steps": 1000}, AT_ONCE),
        ({"warmup_steps": 2, "constant_steps": 10}, "constant_steps=10 together"),
        ({"warmup_steps": 2, "constant_steps": 9}, None),
        ({"warmup_steps": 2, "constant_steps": 0}, None),
        ({"warmup_steps": 2, "constant_steps": 1000, "name": "linear"}, None),
        ({"warmup_steps": 11, "constant_steps": 0}, None),
        ({"warmup_steps": 12, "constant_steps": 0}, "warms up for 12: the learning rate never reaches model.optim.lr="),
        ({"warmup_steps": None, "warmup_ratio": 1.0, "name": "constant"}, "warms up for 12"),
    ],
)
def test_a_run_too_short_for_its_schedule_says_so(
    settings: dict[str, Any], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    rates(1, 12, **settings)
    assert [warning in record.getMessage() for record in caplog.records if warning] == [True] * bool(warning)
    assert bool(caplog.records) == bool(warning)


def test_every_parameter_group_follows() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(()))], "weight_decay": decay} for decay in (0.0, 0.1)]
    optimizer = SGD(groups, lr=1.0)
    sched = SchedConfig(name="linear", warmup_steps=0, min_lr=0.0)
    scheduler = build_scheduler(optimizer, OptimConfig(lr=1.0, sched=sched), 0, 4)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.75]
