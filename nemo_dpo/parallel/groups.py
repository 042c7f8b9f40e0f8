"""Process groups: the only module that touches megatron-core's `parallel_state`."""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed


@dataclass(frozen=True)
class Layout:
    """How a model is spread over `world` ranks.

    Attributes:
        tp: ranks that share every weight matrix.
        pp: pipeline stages.
        vpp: model chunks a pipeline rank holds, or None.
        sequence_parallel: the tensor parallel ranks also share the sequence, outside the matrix products.
        world: all ranks.
        ep: data-parallel ranks that share the experts of each layer.
    """

    world: int
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sequence_parallel: bool = False
    ep: int = 1

    @property
    def dp(self) -> int:
        """Replicas of the model."""
        return self.world // (self.tp * self.pp)


@dataclass(frozen=True)
class Groups:
    """This process's place in the layout."""

    layout: Layout
    device: torch.device
    collection: ProcessGroupCollection

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.collection.dp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def is_first_stage(self, chunk: int | None = None) -> bool:
        """Whether this rank (or its virtual chunk) holds the embedding."""
        return self.pp.rank() == 0 and chunk in (None, 0)

    def is_last_stage(self, chunk: int | None = None) -> bool:
        """Whether this rank (or its virtual chunk) holds the output layer."""
        return self.pp.rank() == self.pp.size() - 1 and chunk in (None, (self.layout.vpp or 1) - 1)

    def sum_over_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor on the host, as on every data-parallel rank."""
        total = tensor.to(self.device)
        dist.all_reduce(total, group=self.dp)
        return total.cpu()

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place: every pipeline rank gets what the last stage holds."""
        if self.pp.size() > 1:
            dist.broadcast(tensor, src=dist.get_global_rank(self.pp, self.pp.size() - 1), group=self.pp)
        return tensor


def initialize(
    layout: Layout, device: torch.device, seed: int, timeout: datetime.timedelta = datetime.timedelta(minutes=30)
) -> Groups:
    """Make megatron-core's groups over the ranks of the default group and seed its generators.

    Args:
        timeout: of the groups' collectives.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        distributed_timeout_minutes=timeout.total_seconds() / 60,  # type: ignore[arg-type]
    )
    groups = Groups(layout, device, ProcessGroupCollection.use_mpu_process_groups())
    # Different dropout on every replica and stage; within a stage megatron-core's tracker tells the tp ranks apart.
    own_seed = seed + 100 * groups.pp.rank() + 10_000 * groups.dp.rank()
    torch.manual_seed(own_seed)
    model_parallel_cuda_manual_seed(own_seed, force_reset_rng=True)
    return groups


def drawing_apart(sequence_parallel: bool) -> contextlib.AbstractContextManager[None]:
    """Inside a layer: the tp ranks, which hold different parts of a tensor, draw different numbers for it.

    Under sequence parallelism megatron-core sees to that around all layers. A fork within its fork would be forgotten
    by recompute, which then draws other masks than the forward pass.
    """
    return contextlib.nullcontext() if sequence_parallel else get_cuda_rng_tracker().fork()
