"""What a step of an adapter must not do."""

from __future__ import annotations

from pathlib import Path

from tests.lora.switch_cases import operators
from tests.model.model_cases import make_case
from tests.support.ranks import run_ranks


def test_no_frozen_weight_is_copied_for_every_position(tmp_path: Path) -> None:
    """torch does so in the backward pass if the gradient has gaps: it is a batched product then."""
    for name in ("model", "ranks", "out"):
        (tmp_path / name).mkdir()
    nemo = make_case(tmp_path / "model").nemo
    found = run_ranks(1, operators, tmp_path / "ranks", nemo, tmp_path / "out" / "gradients")[0]
    assert "aten::mm" in found and "LinearWithFrozenWeightBackward" in found
    assert "aten::bmm" not in found
