"""What checkpoints may be ranked by and called."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_dpo.config.checkpoint_names import KNOWN, checkpoint_name, name_problems
from nemo_dpo.config.exp_manager import CheckpointCallbackParams


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("gpt--{val_loss:.3f}-{step}", "gpt--val_loss=0.123-step=40"),
        ("{step}-{consumed_samples}-{epoch}", "step=40-consumed_samples=320-epoch=0"),
        ("{val_rewards/margins:.1f}-{step:04d}", "val_rewards=1.5-step=0040"),
        ("plain", "plain"),
        ("{never_logged:.2f}", "never_logged=0.00"),
    ],
)
def test_checkpoint_names(template: str, name: str) -> None:
    values = {"val_loss": 0.12345, "step": 40, "consumed_samples": 320, "epoch": 0, "val_rewards/margins": 1.5}
    assert checkpoint_name(template, values) == name


def problems(**params: Any) -> list[str]:
    return list(name_problems(CheckpointCallbackParams(**{"filename": "{step}", **params})))


@pytest.mark.parametrize("monitor", KNOWN)
def test_every_figure_of_a_save_may_rank_and_name(monitor: str) -> None:
    assert problems(monitor=monitor, filename=f"gpt--{{{monitor}:.3f}}-{{step:05d}}") == []


@pytest.mark.parametrize(
    ("monitor", "remedy"),
    [
        ("val_lss", "did you mean val_loss?"),
        ("loss", "did you mean val_loss?"),
        ("val_rewards/margin", "did you mean val_rewards/margins?"),
        ("zzz", "use one of val_loss, val_preference_loss, "),
    ],
)
def test_a_monitor_that_names_no_figure(monitor: str, remedy: str) -> None:
    (problem,) = problems(monitor=monitor, filename=f"gpt--{{{monitor}:.3f}}-{{step}}")
    assert problem.startswith(f"exp_manager.checkpoint_callback_params.monitor={monitor} is no figure of a validation")
    assert remedy in problem


@pytest.mark.parametrize(
    ("filename", "text"),
    [
        ("runs/{step}", "gives 'runs/step=0', which must be the name of a folder: without a /"),
        (".{step}", "gives '.step=0'"),
        ("..", "gives '..'"),
        ("", "gives ''"),
        ("last", "gives 'last'"),
        ("x" * 201, "of at most 200 bytes"),
        ("{val_los:.3f}", "names val_los, which no save knows; did you mean val_loss?"),
        ("{step.real}", "names step.real, which no save knows"),
        ("{val_loss:d}", "cannot be filled in: Unknown format code 'd'"),
        ("{step:.3q}", "cannot be filled in: "),
        ("{step", "cannot be filled in: expected '}'"),
        ("{}", "cannot be filled in: "),
    ],
)
def test_a_name_that_cannot_be_given(filename: str, text: str) -> None:
    (problem,) = problems(filename=filename)
    assert problem.startswith(f"exp_manager.checkpoint_callback_params.filename={filename} ") and text in problem
