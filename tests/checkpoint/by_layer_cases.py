"""One rank of test_by_layer.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def loaded(_rank: int, nemo: Path, layout: Any, by_layer: Path) -> dict[str, Any]:
    """A hollow model loaded by layer, each layer hollowed out again: what was there when, and whether it was right.

    The layers come from `by_layer`, the weights that they should have from `nemo`.
    """
    from nemo_dpo.checkpoint import archive, sharded
    from nemo_dpo.model.architecture import Architecture
    from nemo_dpo.model.build import BuildOptions, build_model
    from nemo_dpo.parallel import cpu_host
    from nemo_dpo.parallel.groups import initialize
    from nemo_dpo.quantization.linear import Nf4Linear

    cpu_host.install()
    groups, weights = initialize(layout, torch.device("cpu"), seed=1), nemo / archive.MODEL_WEIGHTS
    arch = Architecture.parse(archive.read_model_config(nemo))
    expected, _ = build_model(arch, groups, BuildOptions(dtype=torch.float32))
    sharded.load_weights(weights, expected)
    chunks, _ = build_model(arch, groups, BuildOptions(dtype=torch.float32, hollow=True))
    linears = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Nf4Linear)]
    layers = [layer for chunk in expected for layer in chunk.decoder.layers]
    found: dict[str, Any] = {"linears": [len(linears)], "real": [real(linears)], "equal": []}
    for layer, whole in zip(sharded.load_by_layer(by_layer, chunks, groups.device), layers, strict=True):
        found["real"].append(real(linears))
        found["equal"].append(same(layer, whole))
        for module in layer.modules():
            if isinstance(module, Nf4Linear):
                module.weight = nn.Parameter(module.weight.to("meta"))
    for chunk in (*chunks, *expected):
        del chunk.decoder.layers
    found["equal"] += [same(chunk, whole) for chunk, whole in zip(chunks, expected, strict=True)]
    return found


def real(linears: list[Any]) -> int:
    """How many have a weight in memory."""
    return sum(not linear.weight.is_meta for linear in linears)


def same(module: nn.Module, other: nn.Module) -> bool:
    held, expected = dict(module.named_parameters()), dict(other.named_parameters())
    return held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in held)
