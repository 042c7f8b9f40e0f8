"""The model, its gradients and its optimizer on this rank, driven by megatron-core.

Scaling has one owner, this module: a loss is a sum and comes with a weight (every pair's is 1, unless a loss says
otherwise); the gradients of all micro-batches and ranks are added and divided once, by the all-reduced weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_dpo.config.schema import OptimConfig
from nemo_dpo.parallel import mcore_repairs
from nemo_dpo.parallel.experts import Counted, load_balance, routers, weigh
from nemo_dpo.parallel.groups import Groups

# What a chunk returned → (sum, weight, what to collect)
Reduce = Callable[[Any], tuple[Tensor, Tensor, Any]]
# (iterator over micro-batches, chunk) → (what the chunk returned, what becomes of it on the last stage)
ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Any, Reduce]]

# How megatron-core lays out the distributed optimizer's state in a checkpoint: the one way in 0.16 that may be loaded
# under another tp, pp and dp.
CHECKPOINT_LAYOUT = {"distrib_optim_sharding_type": "fully_reshardable"}


NO_TOKENS = torch.zeros((), dtype=torch.int)


class MicroBatchLike(Counted, Protocol):
    """Whatever it carries, its tokens are [rows, S]."""

    @property
    def tokens(self) -> Tensor: ...


class Evaluator:
    """Chunks of the model under megatron-core's schedules, forward only: no gradients, no optimizer.

    Attributes:
        chunks: the bare model chunks of this pipeline rank, with their parameters.
    """

    def __init__(self, chunks: Sequence[MegatronModule], groups: Groups) -> None:
        self.chunks = list(chunks)
        self.groups = groups
        self._weight = torch.zeros((), dtype=torch.float64, device=groups.device)  # of the batch in progress
        self.routers = routers(chunks)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters of this rank that updates change."""
        return [p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad]

    def forward_only(self, micro_batches: Sequence[MicroBatchLike], step: ForwardStep) -> list[Any]:
        """Return what `step` collected (last stage) in a pass in eval mode, without gradients."""
        with torch.no_grad(), evaluation(self.chunks):
            return self._run(self.chunks, micro_batches, step, forward_only=True)

    def _run(
        self,
        models: Sequence[nn.Module],
        micro_batches: Sequence[MicroBatchLike],
        step: ForwardStep,
        *,
        forward_only: bool,
    ) -> list[Any]:
        rows, length = micro_batches[0].tokens.shape
        self._weight.zero_()
        iterators = [iter(micro_batches) for _ in models]
        return get_forward_backward_func()(
            forward_step_func=self._weighed(step),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(models),
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _weighed(self, step: ForwardStep) -> ForwardStep:
        """`step`, its weights added up here: megatron-core counts tokens, and in integers only."""

        def weighed(iterator: Iterator[Any], chunk: nn.Module) -> tuple[Any, Reduce]:
            output, reduce = step(iterator, chunk)

            def note(output: Any) -> tuple[Tensor, Tensor, Any]:
                total, weight, collected = reduce(output)
                self._weight += weight.detach()
                return total, NO_TOKENS, collected

            return output, note

        return weighed


class Engine(Evaluator):
    """Chunks of the model under megatron-core's DDP, with its optimizer and schedules.

    Attributes:
        chunks: parameters loaded before construction; those that do not ask for a gradient stay as they are.
        optimizer: megatron-core's; its fp32 master copies are made at construction.
    """

    def __init__(
        self, chunks: Sequence[MegatronModule], config: TransformerConfig, groups: Groups, optim: OptimConfig
    ) -> None:
        super().__init__(chunks, groups)
        self._balances = any(router.is_aux_loss_enabled() for router in self.routers)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=is_distributed(optim)
        )
        self._ddp = [
            DistributedDataParallel(
                config, ddp_config, chunk, disable_bucketing=number > 0, pg_collection=groups.collection
            )
            for number, chunk in enumerate(self.chunks)
        ]
        config.finalize_model_grads_func = self._divide_by_weight
        self.optimizer = get_megatron_optimizer(optimizer_config(optim, config), self._ddp)
        for part in self.optimizer.chained_optimizers:
            mcore_repairs.repair_optimizer(part)
        for group in self.optimizer.param_groups:
            group["weight_decay"] *= group["wd_mult"]  # 0 for norms and biases; left to a scheduler of megatron-core's

    def forward_backward(self, micro_batches: Sequence[MicroBatchLike], step: ForwardStep) -> list[Any]:
        """Leave the gradient of sum / weight of the global batch; return what `step` collected (last stage)."""
        for ddp in self._ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._balances:
            self._pairs = sum(batch.num_pairs for batch in micro_batches)
            self._tokens = weigh(self.routers, micro_batches, self.groups)
        return self._run(self._ddp, micro_batches, step, forward_only=False)

    def load_balance(self) -> dict[str, float]:
        """The routers' auxiliary loss in the last `forward_backward`, without its coefficient, if there is one."""
        if not self._balances:
            return {}
        return {"load_balancing_loss": load_balance(self.routers, self._tokens, self.routers[0].config.num_layers)}

    def update(self, clip_grad: float, *, wanted: bool = True) -> float:
        """One optimizer step on the gradients left by `forward_backward`, if it is `wanted` and their norm is finite.

        Args:
            clip_grad: limit on the gradient's global L2 norm; 0 clips nothing.

        Returns:
            The norm before clipping, the same on all ranks. If it is NaN or infinite no parameter has changed.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not (wanted and math.isfinite(norm)):
            return norm
        if clip_grad > 0:
            for part in self.optimizer.chained_optimizers:  # experts have one of their own
                clip_grad_by_total_norm_fp32(part.get_parameters(), clip_grad, norm)
        self.optimizer.step_with_ready_grads()
        return norm

    def _divide_by_weight(self, chunks: list[Any], _tokens: Tensor, **groups: Any) -> None:
        if self._balances and self.groups.is_last_stage() and float(self._weight) != self._pairs:
            raise ValueError(
                f"the objective weighs {self._pairs} pairs as {float(self._weight)}; beside the routers' auxiliary "
                "loss every pair must weigh 1"
            )
        finalize_model_grads(chunks, self._weight, **groups)

    def sharded_weights(self, prefix: str = "") -> dict[str, Any]:
        """What is trained as megatron-core's sharded tensors, one entry a chunk; keys are behind `prefix`."""
        return {f"model{n}": chunk.sharded_trainable(prefix) for n, chunk in enumerate(self.chunks)}

    def sharded_optimizer(self, weights: dict[str, Any], *, loading: bool = False) -> Any:
        """The optimizer's state for the `weights` that `sharded_weights` gave."""
        for part in self.optimizer.chained_optimizers:
            (mcore_repairs.fill_state if loading else mcore_repairs.begin_state)(part)
        return self.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=CHECKPOINT_LAYOUT)

    def refine_masters(self, exact: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Start the fp32 master copies of parameters from the tensors of which the parameters are rounded copies.

        Masters made from bf16 parameters all start half a rounding step away from any change, so that the first
        updates of a small learning rate are lost; the parameters themselves stay as they are.
        """
        for parameter, tensor in exact:
            # In fp32 a parameter is its own master; of a sharded one this rank may hold nothing.
            if parameter.dtype is torch.float32:
                continue
            master: Tensor | None = parameter.main_param  # type: ignore[attr-defined]
            if master is not None:
                master.data.copy_(tensor.reshape(-1)[self._owned(parameter)].view_as(master))

    def _owned(self, parameter: nn.Parameter) -> slice:
        """The part of a flattened parameter whose master is on this rank."""
        for part in self.optimizer.chained_optimizers:
            if isinstance(part, DistributedOptimizer) and parameter in part.model_param_gbuf_map:
                owned = part._get_model_param_range_map(parameter)["param"]
                return slice(owned.start, owned.end)
        return slice(None)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_weights` named, once it is filled."""
        for n, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state[f"model{n}"], strict=not chunk.frozen_base)

    def load_optimizer(self, state: Any) -> None:
        """Take over what `sharded_optimizer(loading=True)` named, once it is filled: the moments and their step.

        Learning rate, weight decay and the other options stay those of this start's configuration.
        """
        own = [_options(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        for part in self.optimizer.chained_optimizers:
            mcore_repairs.separate_steps(part)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    # Optimizers with fused kernels count their steps in the group.
    return {name: value for name, value in group.items() if name not in ("params", "step")}


@contextlib.contextmanager
def evaluation(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Dropout off inside; every module's own mode is restored, also after an exception."""
    modes = [(module, module.training) for top in modules for module in top.modules()]
    for top in modules:
        top.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def weights_swapped(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> Iterator[None]:
    """`parameters` point at `weights` inside, at their own storage again afterwards; no copies.

    Once an `Engine` has them, only at weights of the same dtype: another makes autograd forget the hooks by which
    megatron-core collects gradients.
    """
    own = [parameter.data for parameter in parameters]
    try:
        _point(parameters, weights)
        yield
    finally:
        _point(parameters, own)


def _point(parameters: Sequence[nn.Parameter], storages: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(parameters, storages, strict=True):
        parameter.data = tensor


def is_distributed(optim: OptimConfig) -> bool:
    """Whether optimizer state is sharded over the data-parallel ranks."""
    return optim.name == "mcore_distributed_optim"


def optimizer_config(optim: OptimConfig, model: TransformerConfig) -> OptimizerConfig:
    """NeMo's optimizer keys in megatron-core's. Clipping is `Engine.update`'s."""
    return OptimizerConfig(
        optimizer="sgd" if optim.name == "sgd" else "adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        sgd_momentum=optim.momentum,
        use_distributed_optimizer=is_distributed(optim),
        bf16=model.bf16,
        params_dtype=model.params_dtype,
        clip_grad=0.0,
    )
