"""Routing to experts, and the one place that scales the router's auxiliary loss.

The loss that keeps experts evenly loaded is, of a layer and the T tokens of a micro-batch or of a sequence,

    E · Σᵢ fᵢ · Pᵢ,   fᵢ = share of the T · k choices that fell on expert i,   Pᵢ = mean probability of expert i

(arXiv:2101.03961, as megatron-core has it: 1 where all experts are chosen alike). Padding takes no part. What is
minimised is the preference loss per pair + coefficient · Σ over layers of the mean of this over the tokens of the
global batch. megatron-core scales it by a rank's own tokens, for a loss per token; here `weigh` says, once a step and
for all micro-batches, what a token weighs, so that dividing all gradients by the number of pairs gives that mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from nemo_dpo.parallel.groups import Groups

PER_MICRO_BATCH, PER_SEQUENCE = "aux_loss", "seq_aux_loss"


class Counted(Protocol):
    """A micro-batch that knows how much it holds."""

    @property
    def num_pairs(self) -> int: ...
    @property
    def tokens_real(self) -> int: ...


class Router(TopKRouter):
    """megatron-core's router with the auxiliary loss as above, computed in fp32.

    Attributes:
        token_weight: what a token's share of the auxiliary loss is multiplied by in the backward pass.
        load: Σ over the tokens of training passes of their share; what `load_balance` reads and resets.
    """

    token_weight: Tensor | float = 0.0
    load: Tensor | float = 0.0

    def gating(self, input: Tensor) -> Tensor:
        """[..., hidden] → [..., experts]. megatron-core's calls Transformer Engine, also where there is none."""
        return F.linear(input.float(), self.weight.float())

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        if self.routing_type != PER_MICRO_BATCH:
            return probs
        return self._balanced(probs, scores_for_aux_loss, routing_map, parts=1)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        if self.routing_type != PER_SEQUENCE:
            return probs
        return self._balanced(probs, scores_for_aux_loss, routing_map, parts=bsz)

    def _balanced(self, probs: Tensor, scores: Tensor, chosen: Tensor, parts: int) -> Tensor:
        """`probs` with the auxiliary loss hung on.

        Args:
            probs: [tokens, experts], what the experts' outputs are weighed by.
            scores: [tokens, experts] probabilities over all experts; 0 for padding.
            chosen: [tokens, experts] whether the token goes to the expert; False for padding.
            parts: sequences that are judged one by one, the inner dimension of `tokens`.
        """
        experts = self.config.num_moe_experts
        counts = chosen.view(-1, parts, experts).sum(0).float()
        if self.tp_cp_group.size() > 1:  # each rank has its share of a sequence
            dist.all_reduce(counts, group=self.tp_cp_group)
        tokens = (counts.sum(1) / self.topk).clamp(min=1)
        per_token = (scores.view(-1, parts, experts).sum(0) * counts).sum(1) * experts / (self.topk * tokens)
        total = per_token.sum()
        self.load = self.load + total.detach()
        # Its backward scale is 1: megatron-core's schedule sets it from `grad_scale_func`, which is not used here.
        return MoEAuxLossAutoScaler.apply(probs, self.config.moe_aux_loss_coeff * self.token_weight * total)


def routers(chunks: Iterable[nn.Module]) -> list[Router]:
    """Those of the layers on this rank."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]


def described(found: Sequence[Router]) -> dict[str, str]:
    """What a resume must find unchanged: the auxiliary loss is part of what a run minimises."""
    if not found:
        return {}
    config = found[0].config
    return {"the routers' auxiliary loss": f"{config.moe_aux_loss_coeff} × {config.moe_router_load_balancing_type}"}


def weigh(found: Sequence[Router], micro_batches: Sequence[Counted], groups: Groups) -> float:
    """Set what a token weighs in this step: pairs / tokens, of the global batch. Collective over the dp ranks.

    The gradients are divided by the weight of the objective, which must be the number of pairs: it is known only when
    all micro-batches are through, and gradients of both losses are in one sum by then. `Engine` refuses another.

    Returns:
        Tokens of the global batch, padding left out.
    """
    own = [sum(batch.num_pairs for batch in micro_batches), sum(batch.tokens_real for batch in micro_batches)]
    pairs, tokens = groups.sum_over_dp(torch.tensor(own, dtype=torch.float64)).tolist()
    for router in found:
        router.token_weight = pairs / tokens
    return float(tokens)


def load_balance(found: Sequence[Router], tokens: float, layers: int) -> float:
    """The auxiliary loss without its coefficient, mean over tokens and layers, since it was last asked. Collective."""
    total = torch.tensor(sum(float(router.load) for router in found), dtype=torch.float64).to(found[0].weight.device)
    for router in found:
        router.load = 0.0
    dist.all_reduce(total)  # tp ranks have tokens of their own, pp ranks layers, dp ranks micro-batches
    return float(total) / (tokens * layers)


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether expert-parallel ranks have each their own in its place; `mark_experts` says so to megatron-core."""
    return not getattr(parameter, "allreduce", True)


def mark_experts(chunk: nn.Module) -> None:
    """Let megatron-core treat experts as such on one expert-parallel rank too.

    It would keep their optimizer state with the other weights' there, and with two ranks apart: a checkpoint of one
    layout could not be loaded in the other.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.is_expert:
            weight: Any = module.weight
            weight.allreduce = False
