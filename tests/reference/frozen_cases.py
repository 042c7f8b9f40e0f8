"""One rank of test_frozen.py: a policy that learns beside its frozen reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.model.model_cases import build, random_batches


def train_beside_reference(_rank: int, nemo: Path, layout: Any) -> dict[str, Any]:
    """Two updates with dropout; log-probs of policy and reference before and after, and what the reference left."""
    from nemo_dpo.config.schema import DpoConfig
    from nemo_dpo.data.batch import GlobalBatch
    from nemo_dpo.losses import build_objective
    from nemo_dpo.parallel.response import collect_logps
    from nemo_dpo.reference.frozen import FrozenReference
    from nemo_dpo.training.step import objective_step

    engine = build(nemo, layout, hidden_dropout=0.5, attention_dropout=0.5)
    reference = FrozenReference(engine)
    batch = GlobalBatch(tuple(random_batches((2, 1), multiple=layout.tp)))
    for chunk in engine.chunks:
        chunk.train()
    engine.chunks[0].decoder.layers[0].eval()  # a mode of its own must come back too
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    modes = [module.training for chunk in engine.chunks for module in chunk.modules()]
    found: dict[str, Any] = {
        "policy before": engine.forward_only(batch.micro_batches, collect_logps),
        "before": reference.logps(batch),
    }
    for _ in range(2):
        engine.forward_backward(
            batch.micro_batches, objective_step(build_objective(DpoConfig()), reference.logps(batch))
        )
        engine.update(clip_grad=0.0)
    weights, storages = [p.detach().clone() for p in parameters], [p.data_ptr() for p in parameters]
    found["after"] = reference.logps(batch)
    found["policy after"] = engine.forward_only(batch.micro_batches, collect_logps)
    found["modes kept"] = modes == [module.training for chunk in engine.chunks for module in chunk.modules()]
    found["storages kept"] = storages == [p.data_ptr() for p in parameters]
    found["weights kept"] = all(torch.equal(p, weight) for p, weight in zip(parameters, weights, strict=True))
    found["needs gradient"] = any(logps.requires_grad for logps in found["after"])
    return found
