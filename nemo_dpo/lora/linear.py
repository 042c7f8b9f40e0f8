"""megatron-core's parallel linear layers with low-rank adapters beside the weight.

How A and B are shared out over the tensor-parallel ranks follows from the base layer. What is communicated has the
inner dimension only, [tokens, rank]:

| base            | A                 | after A                                  | B                 |
| --------------- | ----------------- | ---------------------------------------- | ----------------- |
| column parallel | on every rank     | nothing (SP: gather the sequence)        | rows shared out   |
| row parallel    | columns shared out | sum over ranks (SP: share the sequence) | on every rank     |
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nemo_dpo.lora.spec import Linear, LoraSpec
from nemo_dpo.parallel.groups import drawing_apart
from nemo_dpo.quantization.linear import Nf4Linear


class Adapter(nn.Module):
    """This rank's share of one adapter of one linear layer.

    Attributes:
        a: name of the A → [rank, inputs].
        b: part → [rows of the part, rank].
        axes: tensor, as `a.<name>` or `b.<part>` → the dimension shared out over the tp ranks, or None.
    """

    def __init__(self, base: LoraLinear, linear: Linear, spec: LoraSpec, dropout: float, dropout_position: str) -> None:
        super().__init__()
        tp = base.tp_group.size()
        a_share, b_share = (1, tp) if base.splits_rows else (tp, 1)
        self.spec, self.linear, self.dropout, self.dropout_position = spec, linear, dropout, dropout_position
        self._share = base.share
        self._sequence_parallel = base.sequence_parallel
        # Whether the tp ranks hold different parts of the input, of the output.
        self._input_differs: bool = base.sequence_parallel or not base.splits_rows
        self._output_differs: bool = base.sequence_parallel or base.splits_rows
        self._groups = linear.groups // b_share if linear.groups > 1 else 1
        self._parts = spec.a_parts(linear)  # a ParameterDict sorts its keys
        dtype, device = base.config.params_dtype, base.weight.device

        def parameter(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))

        self.a = nn.ParameterDict({n: parameter(spec.rank, linear.inputs // a_share) for n in self._parts})
        self.b = nn.ParameterDict({p: parameter(rows // b_share, spec.rank) for p, rows in linear.parts.items()})
        self.axes = {f"a.{name}": None if base.splits_rows else 1 for name in self.a}
        self.axes |= {f"b.{part}": 0 if base.splits_rows else None for part in self.b}
        self._mark(base.sequence_parallel)

    def _mark(self, sequence_parallel: bool) -> None:
        # megatron-core's gradient norm and its reduction of gradients over the tp ranks go by these attributes.
        for name, parameter in self.named_parameters():
            if (axis := self.axes[name]) is not None:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            else:
                # Each rank saw its part of the sequence only.
                parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's input on this rank → what to add to its output on this rank."""
        if self.dropout_position == "pre":
            x = self._drop(x, self._input_differs)
        inner = self._share(F.linear(x, torch.cat([self.a[name] for name in self._parts]))) * self.spec.scale
        outputs = []
        for (_, parts), piece in zip(self._parts.items(), inner.split(self.spec.rank, -1), strict=True):
            outputs += [F.linear(piece, self.b[part]).unflatten(-1, (self._groups, -1)) for part in parts]
        update = torch.cat(outputs, -1).flatten(-2)
        if self.dropout_position == "post":
            update = self._drop(update, self._output_differs)
        return update

    def _drop(self, x: Tensor, differs: bool) -> Tensor:
        """Dropout: where the tp ranks hold different parts of x they must not draw the same mask."""
        if not (self.training and self.dropout):
            return x
        with drawing_apart(self._sequence_parallel) if differs else contextlib.nullcontext():
            return F.dropout(x, self.dropout)


class LoraLinear(nn.Module):
    """Mixed into a parallel linear layer: adapters by name, of which one or none is active.

    Attributes:
        splits_rows: the tp ranks share the rows of the weight (column parallel), else its columns.
        active: name of the adapter that takes part in `forward`.
    """

    splits_rows: bool
    # megatron-core's
    config: TransformerConfig
    tp_group: ProcessGroup
    weight: nn.Parameter
    sequence_parallel: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the base layer; the bias may be returned beside the output."""
        output, bias = super().forward(input_, *args, **kwargs)
        if self.active is not None and self.active in self.adapters:
            output = output + self.adapters[self.active](input_)
        return output, bias

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """megatron-core's matrix product with its communication, both passes."""
        output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        if output.requires_grad and not weight.requires_grad:
            # torch multiplies a gradient with gaps by a frozen weight position by position, each with its own copy of
            # the weight: on a CPU half of the whole step's time.
            output.register_hook(Tensor.contiguous)
        return output

    def share(self, inner: Tensor) -> Tensor:
        """A's output [.., rank] as this rank computed it → as B needs it."""
        raise NotImplementedError

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base layer's; adapters are saved by `lora.adapters`."""
        found = super().sharded_state_dict(prefix, *args, **kwargs)  # type: ignore[misc]
        return {name: entry for name, entry in found.items() if not name.startswith(f"{prefix}adapters.")}


class LoraColumnParallelLinear(LoraLinear, Nf4Linear, ColumnParallelLinear):
    """Rows of the weight shared out: linear_qkv, linear_fc1."""

    splits_rows = True

    def share(self, inner: Tensor) -> Tensor:
        """Every rank has all of A's output; its gradient is summed over the ranks."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(inner, group=self.tp_group)


class LoraRowParallelLinear(LoraLinear, Nf4Linear, RowParallelLinear):
    """Columns of the weight shared out: linear_proj, linear_fc2."""

    splits_rows = False

    def share(self, inner: Tensor) -> Tensor:
        """Sums what the ranks' columns of A gave."""
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
