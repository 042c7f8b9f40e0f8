"""What each rank does in test_dropout.py: a training step with dropout, watched where masks are drawn."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lora.lora_cases import dimensions
from tests.model.model_cases import BETA, SIZES, build, random_batches, reference_logps

RECOMPUTE: dict[str, dict[str, Any]] = {
    "off": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
}


def states_of_rank(_rank: int, nemo: Path, layout: Any, position: str | None) -> dict[str, list[str]]:
    """The generator's state at each draw of a mask, by what it is of: two alike are one mask.

    attention; hidden: hidden states; column, row: what adapters with dropout at `position` read or add, beside column
    and row parallel layers.
    """
    from nemo_dpo.lora.adapters import places

    seen: dict[str, list[str]] = {"attention": [], "hidden": [], "column": [], "row": []}
    inside = ["hidden"]
    attention, dropout = F.scaled_dot_product_attention, F.dropout

    def note(kind: str) -> None:
        seen[kind].append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())

    def watched_attention(*args: Any, dropout_p: float = 0.0, **more: Any) -> Tensor:
        if dropout_p:
            note("attention")
        return attention(*args, dropout_p=dropout_p, **more)

    def watched_dropout(*args: Any, **more: Any) -> Tensor:
        note(inside[-1])
        return dropout(*args, **more)

    F.scaled_dot_product_attention, F.dropout = watched_attention, watched_dropout
    prepare = partial(_add_adapter, dimensions(nemo), position) if position else None
    engine = build(nemo, layout, prepare, hidden_dropout=0.3, attention_dropout=0.3)
    for place in (place for chunk in engine.chunks for place in places(chunk)):
        kind = "column" if place.linear in ("linear_qkv", "linear_fc1") else "row"
        for adapter in place.module.adapters.values():
            adapter.register_forward_pre_hook(lambda *_, kind=kind: inside.append(kind))
            adapter.register_forward_hook(lambda *_, kind=kind: inside.remove(kind))
    _step(engine, layout)
    return seen


def _add_adapter(sizes: Any, position: str, chunks: list[Any]) -> None:
    from nemo_dpo.lora.adapters import activate, attach, initial
    from nemo_dpo.lora.spec import POLICY, LoraSpec, linears_of

    spec = LoraSpec(linears_of(["all"]), rank=4, alpha=6.0)
    for chunk in chunks:
        chunk.freeze_base()
    start = initial(spec, sizes, 3, b="xavier")
    attach(chunks, POLICY, spec, sizes, start, dropout=0.3, dropout_position=position)
    activate(chunks, POLICY)


def gradients_of_rank(_rank: int, nemo: Path, layout: Any, position: str | None) -> dict[str, list[Tensor]]:
    """Kind of recompute → gradients, of the weights or of an adapter with dropout at `position`; equal generators."""
    prepare = partial(_add_adapter, dimensions(nemo), position) if position else None
    found = {}
    for kind, options in RECOMPUTE.items():
        engine = build(nemo, layout, prepare, hidden_dropout=0.3, attention_dropout=0.3, **options)
        _step(engine, layout)
        found[kind] = [parameter.main_grad.clone() for parameter in engine.trainable]
    return found


def _step(engine: Any, layout: Any) -> None:
    from nemo_dpo.config.schema import DpoConfig
    from nemo_dpo.losses import build_objective
    from nemo_dpo.training.step import objective_step

    batches = random_batches(SIZES, multiple=layout.tp)
    objective = build_objective(DpoConfig(ref_policy_kl_penalty=BETA))
    engine.forward_backward(batches, objective_step(objective, reference_logps(batches)))
