"""Losses over preference pairs: pure functions of per-response sums. They know no model, no batch layout, no ranks."""

from nemo_dpo.losses.objective import PREFERENCE_LOSSES, Objective, ObjectiveOptions, ObjectiveOutput, build_objective
from nemo_dpo.losses.types import (
    BatchContext,
    LossConstants,
    LossSum,
    PairStats,
    PreferenceLoss,
    ResponseStats,
)

__all__ = [
    "PREFERENCE_LOSSES",
    "BatchContext",
    "LossConstants",
    "LossSum",
    "Objective",
    "ObjectiveOptions",
    "ObjectiveOutput",
    "PairStats",
    "PreferenceLoss",
    "ResponseStats",
    "build_objective",
]
