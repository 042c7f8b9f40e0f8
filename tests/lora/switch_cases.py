"""One process of test_switch.py and test_cost.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_dpo.lora.spec import POLICY, LoraSpec, linears_of
from tests.lora.lora_cases import dimensions
from tests.model.model_cases import SIZES, build, random_batches, training_step


class Broken(Exception):
    """Raised inside on purpose."""


def switched(_rank: int, nemo: Path) -> dict[str, Any]:
    """Which adapter is active inside `active`, after an exception in it, and after one in a reference pass."""
    from nemo_dpo.data.batch import GlobalBatch
    from nemo_dpo.lora.adapters import activate, active, attach, initial, places
    from nemo_dpo.parallel.groups import Layout
    from nemo_dpo.reference.adapter import AdapterReference

    spec, sizes = LoraSpec(linears_of(["all"]), rank=4, alpha=4.0), dimensions(nemo)

    def prepare(chunks: list[Any]) -> None:
        attach(chunks, POLICY, spec, sizes, initial(spec, sizes, 1))
        activate(chunks, POLICY)

    engine = build(nemo, Layout(1), prepare)
    modules = [place.module for chunk in engine.chunks for place in places(chunk)]
    found: dict[str, Any] = {}
    try:
        with active(engine.chunks, None):
            found["inside"] = {module.active for module in modules}
            raise Broken
    except Broken:
        found["after"] = {module.active for module in modules}

    def fail(*_: Any) -> None:
        raise Broken

    engine.chunks[0].train()
    engine.chunks[0].decoder.layers[1].register_forward_pre_hook(fail)
    try:
        AdapterReference(engine, None).logps(GlobalBatch(tuple(random_batches(SIZES))))
    except Broken:
        found["after reference"] = {module.active for module in modules}
        found["training"] = {module.training for module in modules}
    return found


def operators(_rank: int, nemo: Path, out: Path) -> set[str]:
    """Names of the operators of a training step of an adapter."""
    from nemo_dpo.lora.adapters import activate, attach, initial
    from nemo_dpo.parallel.groups import Layout

    spec, sizes = LoraSpec(linears_of(["all"]), rank=4, alpha=4.0), dimensions(nemo)

    def prepare(chunks: list[Any]) -> None:
        for chunk in chunks:
            chunk.freeze_base()
        attach(chunks, POLICY, spec, sizes, initial(spec, sizes, 1))
        activate(chunks, POLICY)

    engine = build(nemo, Layout(1), prepare)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        training_step(engine, out)
    return {event.key for event in profile.key_averages()}
