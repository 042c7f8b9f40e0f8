"""Let megatron-core run where there is no accelerator.

megatron-core names its device by literals (`device="cuda"`, `'torch.cuda.FloatTensor'`) and by calls of `torch.cuda`.
`install` rewrites the literals in the code of the functions listed below and answers the calls for the host. That is
done once, after import; nothing intercepts an operation while a step runs. Where CUDA is available `install` refuses.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from types import CodeType
from typing import Any

import torch

CPU = torch.device("cpu")

# Module → functions whose literals name a CUDA device or the type of a CUDA tensor.
DEVICE_LITERALS = {
    "megatron.core.pipeline_parallel.schedules": (
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_with_interleaving",
        "forward_backward_pipelining_without_interleaving",
    ),
    "megatron.core.optimizer.clip_grads": ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32", "count_zeros_fp32"),
    "megatron.core.optimizer.optimizer": (
        "MixedPrecisionOptimizer.__init__",
        "Float16OptimizerWithFloat16Params.__init__",
        "FP32Optimizer.__init__",
    ),
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer._build_model_and_main_param_groups",
        "DistributedOptimizer.__init__",
    ),
    "megatron.core.dist_checkpointing.exchange_utils": (
        "_get_empty_tensor_for_exchange",
        "exchange_loaded_tensors_gather_rounds",
    ),
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": ("verify_global_md_reuse",),
}


def install() -> None:
    """Point megatron-core at the host. Idempotent.

    Raises:
        RuntimeError: CUDA is available, or megatron-core no longer has a function listed here.
    """
    if torch.cuda.is_available():
        raise RuntimeError("cpu_host.install() was called on a host with CUDA")
    if torch.cuda.current_device is _current_device:
        return
    for module, names in DEVICE_LITERALS.items():
        for name in names:
            _move_to_host(module, name)
    _answer_for_the_host()


def _move_to_host(module: str, name: str) -> None:
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(function, part):
            raise RuntimeError(f"{module} has no {name}: this megatron-core is not one that cpu_host knows (0.16.1)")
        function = getattr(function, part)
    function = inspect.unwrap(function.__func__ if inspect.ismethod(function) else function)
    function.__code__ = _host_code(function.__code__)


def _host_code(code: CodeType) -> CodeType:
    return code.replace(co_consts=tuple(_host_constant(constant) for constant in code.co_consts))


def _host_constant(constant: Any) -> Any:
    if isinstance(constant, tuple):
        return tuple(_host_constant(item) for item in constant)
    if isinstance(constant, CodeType):
        return _host_code(constant)
    if constant == "cuda":
        return "cpu"
    return (
        constant.replace("torch.cuda.", "torch.")
        if isinstance(constant, str) and constant.endswith("Tensor")
        else constant
    )


def _current_device() -> torch.device:
    return CPU


def _l2_norm(_chunk: int, _overflow: Any, tensors: list[list[torch.Tensor]], _per_tensor: bool, *_: Any) -> Any:
    # megatron-core's stand-in sums squares naively in float32: on SmolLM2 the gradient norm came out 9e-5 too small.
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for group in tensors for tensor in group]
    return torch.stack(norms).norm().float().view(1), None


class _HostStream:
    """A stream on a host without one: everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, _: Any = None) -> _HostStream:
        return self

    def synchronize(self) -> None: ...


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _gather_by_sizes(gather: Any) -> Any:
    """gloo gathers equal shares only; experts' tensor parallel ranks have as many tokens as the router sends them."""

    def gathered(share: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return gather(share, group, None, use_global_buffer)
        longest = max(sizes)
        parts = gather(_padded(share, longest), group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gathered


def _reduce_scatter_by_sizes(reduce_scatter: Any) -> Any:
    """The inverse."""

    def scattered(whole: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return reduce_scatter(whole, group, None, use_global_buffer)
        padded = torch.cat([_padded(part, max(sizes)) for part in whole.split(sizes)])
        return reduce_scatter(padded, group)[: sizes[group.rank()]]

    return scattered


def _moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # megatron-core's leaves a tensor on the host as it is, and all_to_all_single takes no tensor for a list of sizes.
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _answer_for_the_host() -> None:
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as tp_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    cuda: Any = torch.cuda
    cuda.current_device = _current_device
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cpu": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cpu": torch.set_rng_state(state)
    cuda.Stream = _HostStream
    cuda.current_stream = cuda.default_stream = lambda device=None: _HostStream()
    cuda.stream = lambda _: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    clip_grads.l2_norm_impl = _l2_norm
    mappings._gather_along_first_dim = _gather_by_sizes(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_by_sizes(mappings._reduce_scatter_along_first_dim)
    token_dispatcher.maybe_move_tensor_to_cpu = _moved
    tp_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tp_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # The host has one generator: that it changes where the device's is meant to is no reason to warn, at every layer.
    logging.getLogger(tp_random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
