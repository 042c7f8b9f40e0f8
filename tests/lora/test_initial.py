"""Where a new adapter starts."""

from __future__ import annotations

import itertools

import pytest
import torch

from nemo_dpo.config.limits import LIMITS, LORA_TARGETS
from nemo_dpo.lora.adapters import INITIALIZERS, initial
from nemo_dpo.lora.spec import TARGETS, VARIANTS, Dimensions, LoraSpec, linears_of

DIMENSIONS = Dimensions(layers=2, hidden=256, ffn=256, heads=4, query_groups=4, head_channels=64, gated=True)
SPEC = LoraSpec(linears_of(["all"]), rank=64, alpha=64.0, variant="canonical")


def test_a_is_random_and_b_is_zero() -> None:
    tensor = initial(SPEC, DIMENSIONS, seed=1)
    assert torch.count_nonzero(tensor("layers.0.linear_qkv.b.q")) == 0
    # Xavier: variance 2 / (inputs + outputs) = 2 / 320; of 16,384 numbers within 3 %.
    assert tensor("layers.0.linear_qkv.a.q").std().item() == pytest.approx((2 / 320) ** 0.5, rel=0.03)


def test_no_two_tensors_and_no_two_seeds_are_alike() -> None:
    names = [name for name in SPEC.shapes(DIMENSIONS) if ".a." in name]
    drawn = [initial(SPEC, DIMENSIONS, seed)(name) for seed in (1, 2) for name in names]
    assert len(drawn) == 28
    assert not any(torch.equal(left, right) for left, right in itertools.combinations(drawn, 2))


def test_the_same_seed_draws_the_same() -> None:
    left, right = initial(SPEC, DIMENSIONS, 1), initial(SPEC, DIMENSIONS, 1)
    assert all(torch.equal(left(name), right(name)) for name in SPEC.shapes(DIMENSIONS))


@pytest.mark.parametrize(("method", "std"), [("normal", 0.2), ("kaiming", (1 / (3 * 256)) ** 0.5), ("zero", 0.0)])
def test_methods(method: str, std: float) -> None:
    """Kaiming: uniform within ±1/√inputs, the variance of which is 1 / (3 · inputs)."""
    tensor = initial(SPEC, DIMENSIONS, 1, a=method)("layers.1.linear_fc2.a.down")
    assert tensor.std().item() == pytest.approx(std, rel=0.03)


def test_the_configuration_offers_what_there_is() -> None:
    """It may not import what builds adapters, so it has lists of its own."""
    assert tuple(TARGETS) == LORA_TARGETS
    offered = {"variant": VARIANTS, "column_init_method": INITIALIZERS, "row_init_method": INITIALIZERS}
    for key, values in offered.items():
        text = LIMITS[f"model.peft.lora_tuning.{key}"].text
        assert set(text.removeprefix("must be ").split(" or ")) == set(values)
