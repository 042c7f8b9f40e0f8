"""Before the first update policy and reference are one model: not nearly, but bit for bit, in every layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.cli.conftest import GLOBAL_BATCH, VALIDATION_PAIRS, Inputs
from tests.cli.probes import read_facts
from tests.cli.test_equivalence import CASES
from tests.support.cli import run_cli

REWARDS = (
    "rewards_chosen_mean",
    "rewards_rejected_mean",
    "rewards_all_mean",
    "rewards_all_std",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "acc",
)
# Mean of ln 2 in fp32 over a handful of pairs: a rounding of 2⁻²⁴ of the value each.
ROUNDING = 2e-7


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_policy_is_the_reference(inputs: Inputs, tmp_path: Path, name: str, precision: str) -> None:
    case = CASES[name]
    arguments = [*inputs.arguments(precision), *case.arguments, f"trainer.devices={case.ranks}"]
    # A learning rate from the first step on, large enough to be seen in bf16 weights: step 1 must differ.
    changes = ["trainer.dpo.max_steps=2", "model.optim.lr=0.01", "model.optim.sched.warmup_steps=0"]
    run = run_cli([*arguments, *changes], tmp_path, patches=["tests.cli.probes:watch"])
    for row in (run.rows("train")[0], run.rows("val")[0]):
        assert row["step"] == 0
        assert row["loss"] == row["preference_loss"] == pytest.approx(math.log(2), rel=ROUNDING)
        assert [row[reward] for reward in REWARDS] == [0.0] * len(REWARDS)
    _check_logps(read_facts(tmp_path), case.groups, precision)


def _check_logps(ranks: list[dict], groups: tuple[int, int, int], precision: str) -> None:
    tp, _, dp = groups
    with_loss = [facts for facts in ranks if facts["logps"]]
    assert len(with_loss) == tp * dp  # the last pipeline stage
    assert {facts["dtype"] for facts in ranks} == {"torch.float32" if precision == "32" else "torch.bfloat16"}
    for steps_begun, responses in ((0, 2 * VALIDATION_PAIRS), (1, 2 * GLOBAL_BATCH)):
        compared = [(own, ref) for facts in with_loss for step, own, ref in facts["logps"] if step == steps_begun]
        assert sum(len(own) for own, _ in compared) == tp * responses
        assert all(own == ref for own, ref in compared)
    assert any(own != ref for facts in with_loss for step, own, ref in facts["logps"] if step == 2)
