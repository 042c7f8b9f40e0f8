"""Adapters on the chunks of a model: attached, filled, switched, saved as shards."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from nemo_dpo.lora.linear import Adapter, LoraLinear
from nemo_dpo.lora.spec import Dimensions, LoraSpec

TensorOf = Callable[[str], Tensor]  # name of an adapter's tensor, as in lora.spec → the whole of it

INITIALIZERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "xavier": lambda t, g: nn.init.xavier_normal_(t, generator=g),
    "kaiming": lambda t, g: nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=g),
    "normal": lambda t, g: nn.init.normal_(t, std=0.2, generator=g),
    "zero": lambda t, _: t.zero_(),
}


@dataclass(frozen=True)
class Place:
    """An adaptable linear layer of a chunk.

    Attributes:
        path: of the module within its chunk, where layers are counted from the chunk's first.
        layer: number of its transformer layer in the whole model, from 0.
        linear: its name in `Dimensions.linears`.
    """

    path: str
    layer: int
    linear: str
    module: Any


def places(chunk: nn.Module) -> Iterator[Place]:
    """The linear layers of `chunk` that can have adapters."""
    for number, layer in enumerate(chunk.decoder.layers):  # type: ignore[union-attr, arg-type]
        for path, module in layer.named_modules():
            if isinstance(module, LoraLinear):
                name = path.rpartition(".")[2]
                yield Place(f"decoder.layers.{number}.{path}", layer.layer_number - 1, name, module)


def initial(spec: LoraSpec, dimensions: Dimensions, seed: int, a: str = "xavier", b: str = "zero") -> TensorOf:
    """Start values in fp32, one generator per tensor: the same for every layout of the ranks."""
    shapes = spec.shapes(dimensions)

    def tensor(name: str) -> Tensor:
        # One hash of both: of a seed the CPU's generator uses the lower 32 bits only.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return INITIALIZERS[a if ".a." in name else b](torch.empty(shapes[name]), generator)

    return tensor


def attach(
    chunks: Sequence[nn.Module],
    name: str,
    spec: LoraSpec,
    dimensions: Dimensions,
    tensor_of: TensorOf,
    *,
    dropout: float = 0.0,
    dropout_position: str = "post",
) -> list[tuple[nn.Parameter, Tensor]]:
    """Add adapter `name` to the layers that `spec` names, filled from `tensor_of`.

    Returns:
        Each new parameter with this rank's share of its tensor, unrounded.
    """
    added = []
    for chunk in chunks:
        for place in places(chunk):
            if place.linear in spec.linears and spec.adapts(place.layer):
                linear = dimensions.linears()[place.linear]
                adapter = Adapter(place.module, linear, spec, dropout, dropout_position)
                place.module.adapters[name] = adapter
                added += _fill(adapter, place, tensor_of)
    return added


def _fill(adapter: Adapter, place: Place, tensor_of: TensorOf) -> list[tuple[nn.Parameter, Tensor]]:
    group, filled = place.module.tp_group, []
    for name, parameter in adapter.named_parameters():
        whole = tensor_of(f"layers.{place.layer}.{place.linear}.{name}")
        axis = adapter.axes[name]
        share = whole if axis is None else whole.chunk(group.size(), axis)[group.rank()]
        share = share.to(parameter.device)
        parameter.data.copy_(share)
        filled.append((parameter, share))
    return filled


def activate(chunks: Sequence[nn.Module], name: str | None) -> None:
    """Make adapter `name` the one that takes part in forward passes; None is none."""
    for chunk in chunks:
        for place in places(chunk):
            place.module.active = name


@contextlib.contextmanager
def active(chunks: Sequence[nn.Module], name: str | None) -> Iterator[None]:
    """Adapter `name`, or none, inside; afterwards what was active before, also after an exception."""
    modules = [place.module for chunk in chunks for place in places(chunk)]
    before = [module.active for module in modules]
    try:
        activate(chunks, name)
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.active = was


def sharded(chunk: nn.Module, name: str, prefix: str) -> dict[str, ShardedTensor]:
    """Adapter `name` of one chunk for a megatron-core checkpoint.

    Keys of the dictionary are the chunk's own parameter names; keys in the checkpoint are those of `lora.spec` behind
    `prefix`, layer by layer: adapters need not be on all of them.
    """
    groups: Any = chunk.pg_collection
    found = {}
    for place in places(chunk):
        if name not in place.module.adapters:
            continue
        adapter = place.module.adapters[name]
        for part, parameter in adapter.named_parameters():
            key = f"{prefix}layers.{place.layer}.{place.linear}.{part}"
            shared = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp}
            axis = adapter.axes[part]
            found[f"{place.path}.adapters.{name}.{part}"] = (
                make_sharded_tensor_for_checkpoint(parameter, key, **shared)
                if axis is None
                else make_tp_sharded_tensor_for_checkpoint(parameter, key, tp_axis=axis, **shared)
            )
    return found
