"""Defects of megatron-core 0.16.1's optimizers that a resume runs into, each with its symptom and its remedy."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer


def repair_optimizer(part: MegatronOptimizer) -> None:
    """Once, after construction."""
    if isinstance(part, DistributedOptimizer):
        _keep_own_step(part)
    elif part.init_state_fn is None:
        # SGD comes without a function that fills its state before a load: TypeError 'NoneType' is not callable.
        part.init_state_fn = _init_sgd_state


def fill_state(part: MegatronOptimizer) -> None:
    """Before a load: without state the distributed optimizer fails on `len(steps) == 1`.

    Runs a real step on zero gradients, weight decay included: load the weights afterwards.
    """
    if isinstance(part, DistributedOptimizer):
        part._init_optimizer_states_with_dummy_values()


def begin_state(part: MegatronOptimizer) -> None:
    """Before a save: if no update has been made yet there is no state, and saving fails on `len(steps) == 1`.

    Zeros are what the first update starts from.
    """
    optimizer = part.optimizer
    if optimizer.state:
        return
    part.init_state_fn(optimizer, part.config)
    for group in optimizer.param_groups if "betas" in optimizer.defaults else ():
        if not isinstance(optimizer, torch.optim.Adam):  # that and AdamW count for each parameter, fused ones here
            group["step"] = 0
            continue
        for parameter in group["params"]:
            optimizer.state[parameter]["step"] = torch.zeros(())


def separate_steps(part: MegatronOptimizer) -> None:
    """After a load: the distributed optimizer leaves one `step` tensor shared by all parameters.

    torch's Adam then advances it once per parameter: step n + 1 is right, n + 2 silently wrong.
    """
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].detach().clone()


def _keep_own_step(part: DistributedOptimizer) -> None:
    # The fully reshardable format stores no `step` per parameter but the loader asks for it: KeyError 'step'.
    load = part._set_main_param_and_optimizer_states

    def load_keeping_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        load(model_param, {**({"step": state["step"]} if "step" in state else {}), **tensors})

    part._set_main_param_and_optimizer_states = load_keeping_step


def _init_sgd_state(optimizer: Any, _config: object = None) -> None:
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
