"""What test_cpu_host.py looks at in processes of their own: `install` changes a process for good."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from types import CodeType
from typing import Any

import torch

from nemo_dpo.parallel import cpu_host


def listed_functions() -> dict[str, Any]:
    """`module:name` → the function whose code `install` rewrites."""
    found = {}
    for module, names in cpu_host.DEVICE_LITERALS.items():
        for name in names:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            found[f"{module}:{name}"] = inspect.unwrap(getattr(function, "__func__", function))
    return found


def literals(code: CodeType) -> list[str]:
    """The texts that name a device or a tensor type in a function and in those inside it."""
    found: list[str] = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += literals(constant)
        texts = constant if isinstance(constant, tuple) else (constant,)
        found += [t for t in texts if t in ("cuda", "cpu") or (isinstance(t, str) and t.endswith("Tensor"))]
    return found


def install_twice(_rank: int) -> dict[str, Any]:
    """The device literals before and after, and whether a second call changes anything."""
    before = {name: literals(function.__code__) for name, function in listed_functions().items()}
    cpu_host.install()
    after = {name: literals(function.__code__) for name, function in listed_functions().items()}
    codes = {name: function.__code__ for name, function in listed_functions().items()}
    answers = dict(vars(torch.cuda))
    cpu_host.install()
    again = {name: function.__code__ for name, function in listed_functions().items()}
    return {
        "before": before,
        "after": after,
        "same_code": [codes[name] is again[name] for name in codes],
        "same_answers": [value is vars(torch.cuda)[name] for name, value in answers.items()],
        "device": str(torch.cuda.current_device()),
        "tensor_stays": torch.zeros(2).cuda().device.type,
        "hooks": hooks(),
    }


def install_with_an_unknown_function(_rank: int) -> str:
    """The error for a megatron-core that has lost a listed function."""
    cpu_host.DEVICE_LITERALS = {"megatron.core.utils": ("no_such_function",)}  # type: ignore[assignment]
    try:
        cpu_host.install()
    except RuntimeError as error:
        return str(error)
    return "installed"


def hooks() -> dict[str, int]:
    """What would be called at each operation or module of this thread, counted."""
    from torch.nn.modules import module

    return {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "module hooks": len(module._global_forward_hooks) + len(module._global_forward_pre_hooks),
        "saved tensor hooks": int(torch._C._autograd._top_saved_tensors_default_hooks(False) is not None),
        "trace or profile": int(sys.gettrace() is not None) + int(sys.getprofile() is not None),
    }


def record_hooks() -> None:
    """For `run_cli(patches=…)`: print what is live in the middle of each forward pass of a step."""
    from nemo_dpo.training import step

    original = step.pair_stats

    def recorded(*args: Any) -> Any:
        print("live: " + json.dumps(hooks()), flush=True)
        return original(*args)

    step.pair_stats = recorded
