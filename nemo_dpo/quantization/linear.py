"""megatron-core's parallel linear layers over a weight in four bits.

Only the packed weight lives on. A forward pass unpacks it, multiplies and lets go of it; the backward pass, which needs
it for the gradient of the input, unpacks it again. The weight itself gets no gradient.

Each rank packs its own share of a weight, so blocks are formed within that share. Levels and absmax of the blocks are
those of the whole weight where a share consists of whole blocks of it: column parallel, columns × rows of a rank a
multiple of 64; row parallel, columns of a rank a multiple of 64. Where not, they differ. Mean and scales of the absmax
belong to the share in every case: values under different tp agree up to the rounding of an absmax to 8 bits, never
bitwise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nemo_dpo.config import ConfigError
from nemo_dpo.parallel.collective import agree
from nemo_dpo.quantization.nf4 import Nf4Weight

logger = logging.getLogger(__name__)


class Nf4Linear(nn.Module):
    """Mixed in before ColumnParallelLinear or RowParallelLinear; nothing changes until `quantize_` is called.

    Args:
        hollow: leave the weight on the meta device, where it takes no memory, until it is loaded.

    Attributes:
        nf4: this rank's share of the weight once it is packed. `weight` is empty from then on.
    """

    nf4: Nf4Weight | None
    weight: nn.Parameter

    def __init__(self, *args: Any, hollow: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nf4 = None
        if hollow:
            self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)

    def quantize_(self) -> Nf4Weight:
        """Pack the loaded weight and free it. It is frozen afterwards; the bias stays as it is.

        Raises:
            ValueError: it is packed already.
        """
        if self.nf4 is not None:
            raise ValueError(f"{self} is quantized already")
        self.nf4 = Nf4Weight(self.weight)
        # megatron-core asks that there is a weight and whether it wants a gradient, nothing else.
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)
        return self.nf4

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """megatron-core's matrix product with its communication, both passes; `weight` is `self.weight`."""
        product = super()._forward_impl  # type: ignore[misc]
        if (nf4 := self.nf4) is None:
            return product(input, weight, *args, **kwargs)
        unpacked = nf4.dequantize()
        # megatron-core saves the weight for the backward pass: save the packed one in its place. The address stands
        # for `unpacked`, which the hooks would otherwise keep alive.
        address = unpacked.data_ptr()
        with saved_tensors_hooks(
            lambda saved: nf4 if saved.data_ptr() == address else saved,
            lambda saved: saved.dequantize() if saved is nf4 else saved,
        ):
            return product(input, unpacked, *args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # What state_dict and sharded_state_dict both call.
        if self.nf4 is not None:
            raise ValueError(
                f"the weight of {self} is quantized and cannot be saved: a run with a base in 4 bits saves its adapters"
            )
        super()._save_to_state_dict(*args, **kwargs)


def quantize_(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """Pack every `Nf4Linear` in `modules`, one after the other; call it before an optimizer is built. Collective.

    Args:
        modules: with their weights, as many on every rank; taken one by one, so that a generator may load each when it
            is asked for.

    Returns:
        Parameters packed, and the bytes that they take.

    Raises:
        ConfigError: there is none.
        UnpackableError: on any rank, a weight holds what four bits cannot.
    """
    packed: list[Nf4Weight] = []
    for module in modules:
        packed += agree(partial(_pack, module))
    if not packed:
        raise ConfigError(
            "no layer of this model can be quantized: set model.transformer_engine=false, "
            "Transformer Engine's layers keep their weights"
        )
    parameters, size = sum(weight.shape.numel() for weight in packed), sum(weight.nbytes for weight in packed)
    logger.info("NF4: %d layers, %.1f M parameters, %.3f bytes each", len(packed), parameters / 1e6, size / parameters)
    return parameters, size


def _pack(module: nn.Module) -> list[Nf4Weight]:
    return [linear.quantize_() for linear in module.modules() if isinstance(linear, Nf4Linear)]
