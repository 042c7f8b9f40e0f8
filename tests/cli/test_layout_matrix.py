"""A run may go on in any layout after any other: all weights or an adapter, the same pairs, the same losses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Inputs
from tests.cli.faults import STOP_AFTER
from tests.cli.test_equivalence import ADAM, SCHEDULE
from tests.cli.test_lora import ALL
from tests.support.cli import Run, run_cli

STEPS = 6  # an epoch has four, the last of them with a half-full micro-batch
TP, PP, VPP = (f"model.{kind}_model_parallel_size=2" for kind in ("tensor", "pipeline", "virtual_pipeline"))
LAYOUTS = {
    "1 process": ["trainer.devices=1"],
    "DP 2": ["trainer.devices=2"],
    "TP 2 + SP": ["trainer.devices=2", TP, "model.sequence_parallel=true"],
    "PP 2 × VPP 2": ["trainer.devices=2", PP, VPP],
    "TP 2 × DP 2": ["trainer.devices=4", TP],
    "TP 2 × PP 2": ["trainer.devices=4", TP, PP],
}
# Adam's ε as in test_equivalence: where a gradient is as small as its rounding error, the update is noise.
KINDS = {"full": ADAM, "LoRA": [*ALL, "model.optim.lr=0.003", "model.optim.eps=0.0001"]}
ARGUMENTS = [
    f"trainer.dpo.max_steps={STEPS}",
    "trainer.dpo.val_check_interval=100",
    "exp_manager.create_checkpoint_callback=true",
    "model.optim.name=mcore_distributed_optim",
    "model.data.shuffle=true",
    *SCHEDULE,
]


@pytest.fixture(scope="module")
def first_part(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """(kind, layout) → a run that was stopped after STOP_AFTER steps, made once."""
    done: dict[tuple[str, str], Run] = {}

    def once(kind: str, layout: str) -> Run:
        if (kind, layout) not in done:
            arguments = [*inputs.arguments(), *ARGUMENTS, *KINDS[kind], *LAYOUTS[layout]]
            run = run_cli(arguments, tmp_path_factory.mktemp("source"), patches=["tests.cli.faults:stop_early"])
            assert len(run.rows("train")) == STOP_AFTER
            done[kind, layout] = run
        return done[kind, layout]

    return once


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Kind → the run of one process that nothing interrupts, made once."""
    done: dict[str, Run] = {}

    def once(kind: str) -> Run:
        if kind not in done:
            arguments = [*inputs.arguments(), *ARGUMENTS, *KINDS[kind], *LAYOUTS["1 process"]]
            done[kind] = run_cli(arguments, tmp_path_factory.mktemp("whole"))
        return done[kind]

    return once


@pytest.mark.faults
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_in_another_layout(
    inputs: Inputs,
    first_part: Callable[[str, str], Run],
    whole: Callable[[str], Run],
    tmp_path: Path,
    kind: str,
    source: str,
    target: str,
) -> None:
    """As close as the layouts are without a restart: sums of floats in another order, 1e-6 of a loss or a norm."""
    shutil.copytree(first_part(kind, source).log_dir, tmp_path / "run", symlinks=True)
    arguments = [*inputs.arguments(), *ARGUMENTS, *KINDS[kind], *LAYOUTS[target]]
    run, expected = run_cli(arguments, tmp_path / "run"), whole(kind)
    assert [row["step"] for row in run.rows("train")] == list(range(STEPS))
    for exact in ("lr", "epoch", "consumed_samples"):
        assert run.series("train", exact) == expected.series("train", exact)
    for metric in ("loss", "grad_norm", "logps/chosen"):
        assert run.series("train", metric) == pytest.approx(expected.series("train", metric), rel=1e-5), metric
    shutil.rmtree(tmp_path)
