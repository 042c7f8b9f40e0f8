"""What one process finds out about `Engine.update`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.model.model_cases import BETA, SIZES, build, random_batches, reference_logps


def _weights(engine: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for chunk in engine.chunks for p in chunk.parameters()])


def _backward(engine: Any) -> None:
    """Leave the gradient of a DPO loss."""
    from nemo_dpo.config.schema import DpoConfig
    from nemo_dpo.losses import build_objective
    from nemo_dpo.training.step import objective_step

    batches, objective = random_batches(SIZES), build_objective(DpoConfig(ref_policy_kl_penalty=BETA))
    engine.forward_backward(batches, objective_step(objective, reference_logps(batches)))


def clipped_updates(_rank: int, nemo: Path, limits: list[float]) -> dict[str, Any]:
    """Gradient, its norm, and for each of `limits` the norm that `update` gave and what it added to the weights."""
    from nemo_dpo.parallel.groups import Layout

    engine = build(nemo, Layout(1))
    found: dict[str, Any] = {"norms": [], "updates": []}
    for limit in limits:
        start = _weights(engine)
        _backward(engine)
        found["gradient"] = torch.cat([p.main_grad.flatten().clone() for p in engine.chunks[0].parameters()])
        found["norms"].append(engine.update(limit))
        found["updates"].append(_weights(engine) - start)
        with torch.no_grad():  # back to where it was, so that every limit meets the same gradient
            for p, update in zip(engine.chunks[0].parameters(), _parts(engine, found["updates"][-1]), strict=True):
                p -= update
    return found


def _parts(engine: Any, flat: Tensor) -> list[Tensor]:
    parameters = list(engine.chunks[0].parameters())
    return [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]


def update_on_nan(_rank: int, nemo: Path) -> tuple[float, bool]:
    """The norm of a gradient that holds a NaN, and whether its update left all weights as they were."""
    from nemo_dpo.parallel.groups import Layout

    engine = build(nemo, Layout(1))
    start = _weights(engine)
    _backward(engine)
    next(engine.chunks[0].parameters()).main_grad.view(-1)[0] = math.nan
    return engine.update(0.0), torch.equal(_weights(engine), start)


def unwanted_update(_rank: int, nemo: Path) -> tuple[float, bool]:
    """The same of a sound gradient whose update is not wanted."""
    from nemo_dpo.parallel.groups import Layout

    engine = build(nemo, Layout(1))
    start = _weights(engine)
    _backward(engine)
    return engine.update(0.0, wanted=False), torch.equal(_weights(engine), start)


def decayed(_rank: int, nemo: Path, optimizer: str) -> dict[str, float]:
    """What an update without a gradient leaves of each parameter's norm, at lr 0.5 and a weight decay of 0.25."""
    from nemo_dpo.app import layout_of
    from nemo_dpo.checkpoint import archive
    from nemo_dpo.config.schema import Config, ModelConfig, OptimConfig, TrainerConfig
    from nemo_dpo.parallel import cpu_host
    from nemo_dpo.parallel.groups import initialize
    from nemo_dpo.training.policy import build_engine

    cpu_host.install()
    optim = OptimConfig(name=optimizer, lr=0.5, weight_decay=0.25)
    cfg = Config(trainer=TrainerConfig(precision="32", accelerator="cpu"), model=ModelConfig(optim=optim))
    groups = initialize(layout_of(cfg, 1), torch.device("cpu"), seed=1)
    engine, _ = build_engine(cfg, archive.read_model_config(nemo), nemo, "", groups)
    parameters = dict(engine.chunks[0].named_parameters())
    before = {name: float(parameter.detach().norm()) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.main_grad.zero_()
    engine.update(0.0)
    return {name: float(parameter.detach().norm()) / before[name] for name, parameter in parameters.items()}


def masters_at_start(_rank: int, nemo: Path, world: int, optimizer: str) -> dict[str, Tensor]:
    """A bf16 run's parameters and the masters that this rank's optimizer holds, each in one sorted row."""
    from nemo_dpo.app import layout_of
    from nemo_dpo.checkpoint import archive
    from nemo_dpo.config.schema import Config, ModelConfig, OptimConfig, TrainerConfig
    from nemo_dpo.parallel import cpu_host
    from nemo_dpo.parallel.groups import initialize
    from nemo_dpo.training.policy import build_engine

    cpu_host.install()
    cfg = Config(
        trainer=TrainerConfig(precision="bf16", accelerator="cpu"),
        model=ModelConfig(optim=OptimConfig(name=optimizer, lr=1e-6)),
    )
    groups = initialize(layout_of(cfg, world), torch.device("cpu"), seed=1)
    engine, _ = build_engine(cfg, archive.read_model_config(nemo), nemo, "", groups)
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    masters = [p.main_param for p in parameters if p.main_param is not None]
    return {"parameters": _sorted(parameters), "masters": _sorted(masters)}


def _sorted(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors]).sort().values
