"""An adapter as its files hold it: whole tensors, not a rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from nemo_dpo.lora.spec import Dimensions, LoraSpec


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in memory.

    Attributes:
        spec: which layers, which rank.
        tensors: names and shapes as `LoraSpec.shapes`; any floating dtype.
        base: hash of the weights that it was trained on (`checkpoint.fingerprint.weights_hash`); None if unknown.
        peft: PEFT's adapter_config.json, if the adapter was imported: what an export writes again.
    """

    spec: LoraSpec
    tensors: Mapping[str, Tensor]
    base: str | None = None
    peft: Mapping[str, Any] | None = None


class Part(NamedTuple):
    """A part of a linear layer, and the names of its A and B: its rows of the weight change by scale · B · A."""

    layer: int
    linear: str
    part: str
    a: str
    b: str


def parts(spec: LoraSpec, dimensions: Dimensions) -> Iterator[Part]:
    """Every adapted part, layer by layer, the parts of a linear layer in their order."""
    linears = dimensions.linears()
    for layer in filter(spec.adapts, range(dimensions.layers)):
        for linear in spec.linears:
            own = f"layers.{layer}.{linear}"
            for a, served in spec.a_parts(linears[linear]).items():
                for part in served:
                    yield Part(layer, linear, part, f"{own}.a.{a}", f"{own}.b.{part}")
