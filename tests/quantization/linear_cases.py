"""What one rank finds out about quantized parallel layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from nemo_dpo.parallel import cpu_host
from nemo_dpo.parallel.groups import Groups, Layout, initialize
from nemo_dpo.quantization.linear import Nf4Linear

INPUTS, OUTPUTS, TOKENS = 96, 128, 6


class QuantizedColumn(Nf4Linear, ColumnParallelLinear):
    pass


class QuantizedRow(Nf4Linear, RowParallelLinear):
    pass


def groups_of(layout: Layout) -> Groups:
    cpu_host.install()
    return initialize(layout, torch.device("cpu"), seed=1)


def make(kind: type, groups: Groups, dtype: torch.dtype, **options: Any) -> Any:
    """A layer of `kind` under the layout of `groups`, with random weights, another on each rank."""
    layout = groups.layout
    config = ModelParallelConfig(
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    column = issubclass(kind, ColumnParallelLinear)
    options = {
        "skip_bias_add": False,
        **({"gather_output": False} if column else {"input_is_parallel": True}),
        **options,
    }
    layer = kind(INPUTS, OUTPUTS, config=config, init_method=nn.init.normal_, bias=True, tp_group=groups.tp, **options)
    generator = torch.Generator().manual_seed(groups.tp.rank())
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    layer.bias.data.fill_(0.5)  # of a row parallel layer it is on every rank
    return layer.requires_grad_(False)


def input_of(layer: Any, groups: Groups, dtype: torch.dtype) -> Tensor:
    """This rank's input [S, 2, inputs]: the ranks share the sequence, the inputs, or have the same."""
    rank, column = groups.tp.rank(), isinstance(layer, ColumnParallelLinear)
    shares_sequence = column and groups.layout.sequence_parallel
    length = TOKENS // groups.layout.tp if shares_sequence else TOKENS
    inputs = INPUTS if column else INPUTS // groups.layout.tp
    generator = torch.Generator().manual_seed(50 + (rank if shares_sequence or not column else 0))
    return torch.randn(length, 2, inputs, generator=generator).to(dtype).requires_grad_()


def passes(layer: Any, x: Tensor, *, recompute: bool = False) -> dict[str, Tensor]:
    """Output, and gradient of the input for an output gradient that differs between positions."""
    x = x.detach().requires_grad_()
    output = checkpoint(lambda x: layer(x)[0], False, x) if recompute else layer(x)[0]
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape))
    assert x.grad is not None
    return {"output": output.detach(), "gradient": x.grad}


def quantized_and_plain(_rank: int, layout: Layout, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """For both kinds: both passes before and after `quantize_`, with recompute, and of a plain layer that holds the
    unpacked weight."""
    groups = groups_of(layout)
    found = {}
    for name, kind, plain_kind in (
        ("column", QuantizedColumn, ColumnParallelLinear),
        ("row", QuantizedRow, RowParallelLinear),
    ):
        layer, plain = make(kind, groups, dtype), make(plain_kind, groups, dtype)
        x = input_of(layer, groups, dtype)
        found[f"{name}, before"], found[f"{name}, plain before"] = passes(layer, x), passes(plain, x)
        layer.quantize_()
        plain.weight.data.copy_(layer.nf4.dequantize())
        found[f"{name}, quantized"], found[f"{name}, plain"] = passes(layer, x), passes(plain, x)
        found[f"{name}, recomputed"] = passes(layer, x, recompute=True)
    return found


def unpacked_while(_rank: int, layout: Layout) -> dict[str, list[int]]:
    """How many weights have been unpacked and how many of them are in memory, after forward and after backward."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from nemo_dpo.quantization.nf4 import Nf4Weight

    groups = groups_of(layout)
    storages: list[Any] = []
    unpack = Nf4Weight.dequantize

    def counted(weight: Nf4Weight) -> Tensor:
        unpacked = unpack(weight)
        storages.append(StorageWeakRef(unpacked.untyped_storage()))
        return unpacked

    def state() -> list[int]:
        return [len(storages), sum(not storage.expired() for storage in storages)]

    found = {}
    Nf4Weight.dequantize = counted  # type: ignore[method-assign, assignment]
    for name, kind in (("column", QuantizedColumn), ("row", QuantizedRow)):
        storages.clear()
        layer = make(kind, groups, torch.float32)
        layer.quantize_()
        x = input_of(layer, groups, torch.float32)
        output = layer(x)[0]
        found[f"{name}, after forward"] = state()
        output.sum().backward()
        found[f"{name}, after backward"] = state()
    return found


def refusals(_rank: int) -> dict[str, str]:
    """The errors of what a quantized layer cannot do."""
    from nemo_dpo.quantization.linear import quantize_

    groups = groups_of(Layout(1))
    layer = make(QuantizedColumn, groups, torch.float32)
    layer.quantize_()
    metadata = {"dp_cp_group": groups.collection.dp_cp}
    actions = {
        "again": layer.quantize_,
        "state_dict": layer.state_dict,
        "sharded_state_dict": lambda: layer.sharded_state_dict("", (), metadata),
        "nothing to quantize": lambda: quantize_([make(ColumnParallelLinear, groups, torch.float32)]),
    }
    return {name: _error(action) for name, action in actions.items()}


def _error(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def whole_model(_rank: int) -> dict[str, Any]:
    """`quantize_` of two chunks: what it returns, and what is left of the weights."""
    from nemo_dpo.quantization.linear import quantize_

    groups = groups_of(Layout(1))
    chunks = [
        nn.Sequential(make(kind, groups, torch.bfloat16), nn.Linear(4, 4)) for kind in (QuantizedColumn, QuantizedRow)
    ]
    parameters, size = quantize_(chunks)
    layers: list[Any] = [chunk[0] for chunk in chunks]
    return {
        "parameters": parameters,
        "bytes": size,
        "buffers": sum(buffer.nbytes for layer in layers for buffer in layer.buffers()),
        "weights": [(layer.weight.nbytes, layer.weight.requires_grad) for layer in layers],
        "others": [sum(p.numel() for p in chunk[1].parameters()) for chunk in chunks],
        "names": sorted(name for name, _ in chunks[0].named_parameters()),
    }
