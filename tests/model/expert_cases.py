"""A tiny Mixtral, and a rank's part of a step on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.data.batch import MicroBatch
from tests.model.model_cases import BETA, PAD_ID, build, logits_step, random_batches, random_tokens, tokens_only
from tests.model.model_cases import reference_logps as references_of

EXPERTS, CHOSEN = 6, 3  # neither a half of them nor the usual two
MIXTRAL = {
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": False,
}
COEFFICIENT = 3.0  # makes the auxiliary loss's gradients about as large as the preference loss's
SIZES = (2, 1, 1, 0)  # pairs of the micro-batches; the last has nothing but padding
LENGTH = 24


def balance(kind: str, router_logits: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
    """Σ over layers and tokens of a token's share of the auxiliary loss, by its definition, expert by expert."""
    rows, length = batch.tokens.shape
    real = batch.tokens != PAD_ID
    parts = [real] if kind == "aux_loss" else [real & (torch.arange(rows)[:, None] == row) for row in range(rows)]
    total = torch.zeros((), dtype=torch.float64)
    for logits in router_logits:
        probabilities = logits.view(rows, length, EXPERTS).softmax(-1)
        for part in parts:
            ours = probabilities[part]
            chosen = [ours.detach().topk(CHOSEN).indices == expert for expert in range(EXPERTS)]
            for expert in range(EXPERTS if len(ours) else 0):
                share = chosen[expert].sum() / (len(ours) * CHOSEN)
                total = total + len(ours) * EXPERTS * share * ours[:, expert].mean()
    return total


def step_of_rank(_rank: int, nemo: Path, layout: Any, kinds: tuple[str, ...], out: Path, **options: Any) -> Any:
    """Kind of auxiliary loss → this rank's part of logits, figures and gradients of one step over SIZES."""
    from nemo_dpo.checkpoint import sharded
    from nemo_dpo.config.schema import DpoConfig
    from nemo_dpo.losses import build_objective
    from nemo_dpo.parallel.response import collect_logps
    from nemo_dpo.training.step import objective_step

    found = {}
    for kind in kinds:
        engine = build(nemo, layout, load_balancing=kind, load_balancing_weight=COEFFICIENT, **options)
        dp, multiple = engine.groups.dp, layout.tp if layout.sequence_parallel else 1
        own = slice(dp.rank(), None, dp.size())
        every = random_batches(SIZES, multiple=multiple)
        batches, references = every[own], references_of(every)[own]
        logits = engine.forward_only([tokens_only(random_tokens(2, LENGTH))], logits_step)
        last = bool(engine.forward_only(batches, collect_logps))
        objective = build_objective(DpoConfig(ref_policy_kl_penalty=BETA))
        engine.forward_backward(batches, objective_step(objective, references if last else []))
        engine.optimizer.prepare_grads()
        norm = engine.optimizer.get_grad_norm()
        figures = engine.load_balance()
        with torch.no_grad():
            for parameter in engine.trainable:
                parameter.copy_(parameter.main_grad)
        sharded.save_weights(out / kind, engine)
        experts = engine.chunks[0].decoder.layers[0].mlp.experts
        found[kind] = {
            "logits": logits[0] if logits else None,
            "grad_norm": float(norm),
            "experts": len(experts.local_experts),
            "fc1": list(experts.local_experts[0].linear_fc1.weight.shape),
            **figures,
        }
    return found


def refusal_of_rank(_rank: int, nemo: Path, layout: Any) -> str:
    """What the engine says to an objective in which every pair weighs 2."""
    from nemo_dpo.parallel.response import forward_responses

    engine = build(nemo, layout)

    def step(iterator: Any, chunk: Any) -> Any:
        weight = torch.tensor(2.0)
        return forward_responses(
            iterator, chunk, lambda batch, logps, _: (logps.sum(), weight * batch.num_pairs, logps.detach())
        )

    try:
        engine.forward_backward(random_batches(SIZES), step)
    except ValueError as error:
        return str(error)
    return "no refusal"
