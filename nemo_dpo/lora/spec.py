"""What a LoRA adapter is: which linear layers, which rank, and the names and shapes of its tensors. No torch.

A fused layer of megatron-core consists of parts: q, k and v; gate and up. Each part has a B of its own. In the variant
`nemo` the parts share one A, as in NeMo; in `canonical` each has its own, as in PEFT. The tensors of an adapter are
named `layers.<layer>.<linear>.a.<parts>`, [rank, inputs], and `layers.<layer>.<linear>.b.<part>`, [outputs, rank]; rows
of q, k and v are in Hugging Face's order (head by head), not interleaved by query groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

POLICY = "policy"  # the name of the adapter that is trained

# NeMo's target → megatron-core's linear layers
TARGETS = {
    "attention_qkv": ("linear_qkv",),
    "attention_dense": ("linear_proj",),
    "mlp_fc1": ("linear_fc1",),
    "mlp_fc2": ("linear_fc2",),
    "attention": ("linear_qkv", "linear_proj"),
    "mlp": ("linear_fc1", "linear_fc2"),
    "all": ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
}
VARIANTS = ("nemo", "canonical")


@dataclass(frozen=True)
class Linear:
    """A linear layer of the whole model.

    Attributes:
        inputs: columns of its weight.
        parts: part → its rows of the weight.
        groups: the weight holds the first n-th of each part, then the second n-th of each, and so on (query groups).
    """

    inputs: int
    parts: Mapping[str, int]
    groups: int = 1


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a transformer's layers, over all ranks."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    query_groups: int
    head_channels: int
    gated: bool
    experts: int = 0  # in place of the MLP, if there are any

    @property
    def query_rows(self) -> int:
        """Of the query projection."""
        return self.heads * self.head_channels

    @property
    def key_rows(self) -> int:
        """Of the key projection, and of the value projection."""
        return self.query_groups * self.head_channels

    def linears(self) -> dict[str, Linear]:
        """megatron-core's linear layers that can have adapters, by name: those of experts cannot."""
        qkv = {"q": self.query_rows, "k": self.key_rows, "v": self.key_rows}
        attention = {
            "linear_qkv": Linear(self.hidden, qkv, self.query_groups),
            "linear_proj": Linear(self.query_rows, {"o": self.hidden}),
        }
        if self.experts:
            return attention
        return {
            **attention,
            "linear_fc1": Linear(self.hidden, {"gate": self.ffn, "up": self.ffn} if self.gated else {"up": self.ffn}),
            "linear_fc2": Linear(self.ffn, {"down": self.hidden}),
        }


@dataclass(frozen=True)
class LoraSpec:
    """An adapter's shape.

    Attributes:
        linears: names of the adapted linear layers, as in `Dimensions.linears`.
        rank: inner dimension.
        alpha: the update is multiplied by alpha / rank.
        variant: see the module.
        layers: numbers of the adapted transformer layers from 0; None is all of them.
    """

    linears: tuple[str, ...]
    rank: int
    alpha: float
    variant: str = "nemo"
    layers: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, layer: int) -> bool:
        """Whether transformer layer `layer`, from 0, has adapters."""
        return self.layers is None or layer in self.layers

    def a_parts(self, linear: Linear) -> dict[str, tuple[str, ...]]:
        """Name of each A → the parts that it serves, in order."""
        parts = tuple(linear.parts)
        return {part: (part,) for part in parts} if self.variant == "canonical" else {"_".join(parts): parts}

    def shapes(self, dimensions: Dimensions) -> dict[str, tuple[int, int]]:
        """Name → shape of every tensor of the adapter."""
        known = dimensions.linears()
        found = {}
        for layer in filter(self.adapts, range(dimensions.layers)):
            for name in self.linears:
                linear, prefix = known[name], f"layers.{layer}.{name}"
                found.update({f"{prefix}.a.{a}": (self.rank, linear.inputs) for a in self.a_parts(linear)})
                found.update({f"{prefix}.b.{part}": (rows, self.rank) for part, rows in linear.parts.items()})
        return found


def linears_of(targets: Iterable[str]) -> tuple[str, ...]:
    """NeMo's `target_modules` → linear layers, each once, in the order of `all`."""
    wanted = {linear for target in targets for linear in TARGETS[target]}
    return tuple(linear for linear in TARGETS["all"] if linear in wanted)


def layers_of(selection: Iterable[int] | None, layers: int) -> tuple[int, ...] | None:
    """NeMo's `layer_selection`, numbers from 1 → `LoraSpec.layers`; all of `layers` by number are None as well."""
    numbers = sorted({number - 1 for number in selection or range(1, layers + 1)})
    return None if len(numbers) == layers else tuple(numbers)
