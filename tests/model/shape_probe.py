"""The sizes of all tensors that a training step makes, seen by a dispatch mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.model.model_cases import build, logits_step, random_batches, reference_logps

CHUNK = 8


class Sizes(TorchDispatchMode):
    """Notes (elements, operation) of every tensor that an operation returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [(leaf.numel(), str(func)) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out

    @property
    def largest(self) -> int:
        return max(size for size, _ in self.seen)


def sizes_of_rank(_rank: int, nemo: Path, layout: Any, pairs: int) -> dict[str, Any]:
    """The largest tensor of a training step, of the reference's pass and, to compare, of a pass that makes logits."""
    from nemo_dpo.config.schema import DpoConfig
    from nemo_dpo.data.batch import GlobalBatch
    from nemo_dpo.losses import build_objective
    from nemo_dpo.reference.frozen import FrozenReference
    from nemo_dpo.training.step import objective_step

    engine = build(nemo, layout, logps_chunk=CHUNK)
    batches = random_batches([pairs], multiple=layout.tp)
    found: dict[str, Any] = {
        "parameters": max(parameter.numel() for parameter in engine.chunks[0].parameters()),
        "all_parameters": sum(parameter.numel() for parameter in engine.chunks[0].parameters()),
        "response_tokens": len(batches[0].targets),
        "rows": engine.chunks[0].output_weight().shape[0],
    }
    frozen = FrozenReference(engine)
    with Sizes() as reference:
        frozen.logps(GlobalBatch(tuple(batches)))
    with Sizes() as step:
        engine.forward_backward(batches, objective_step(build_objective(DpoConfig()), reference_logps(batches)))
    with Sizes() as dense:
        engine.forward_only(batches, logits_step)
    return {
        **found,
        "reference": reference.largest,
        # The gradient buffer, one tensor for all parameters, is zeroed as a whole.
        "step": max(size for size, _ in step.seen if size != found["all_parameters"]),
        "step_operations": sorted({name for _, name in step.seen}),
        "dense": dense.largest,
    }
