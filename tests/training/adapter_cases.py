"""One process of test_adapters.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nemo_dpo.config.peft import LoraTuningConfig, PeftConfig
from tests.model.model_cases import build

BASE = "00" * 32  # hash of the weights, which the adapters here do not name


def costs(_rank: int, nemo: Path, dimensions: Any, runs: Mapping[str, PeftConfig]) -> dict[str, Counter[str]]:
    """Run → how often `adapt` reads a file, hashes an adapter, and draws a tensor."""
    from nemo_dpo.lora import adapters as lora
    from nemo_dpo.parallel.groups import Layout
    from nemo_dpo.training import adapters

    count: Counter[str] = Counter()

    def counted(name: str, run: Any) -> Any:
        return lambda *args, **more: count.update([name]) or run(*args, **more)

    adapters.read_adapter = counted("read", adapters.read_adapter)
    adapters.tensors_hash = counted("hashed", adapters.tensors_hash)
    lora.INITIALIZERS.update({name: counted("drawn", draw) for name, draw in lora.INITIALIZERS.items()})
    found = {}
    for name, peft in runs.items():
        count.clear()
        run = partial(adapters.adapt, peft=peft, dimensions=dimensions, base=BASE, seed=1, layout=Layout(1))
        build(nemo, Layout(1), run)
        found[name] = count.copy()
    return found


def answers(_rank: int, adapter: Path, dimensions: Any, questions: Mapping[str, LoraTuningConfig]) -> dict[str, str]:
    """Question → the refusal of that `lora_tuning` beside the file `adapter`, or "accepted"."""
    from nemo_dpo.checkpoint import CheckpointError
    from nemo_dpo.parallel.groups import Layout
    from nemo_dpo.training.adapters import adapt

    found = {}
    for name, tuning in questions.items():
        peft = PeftConfig("lora", restore_from_path=str(adapter), lora_tuning=tuning)
        try:
            adapt([], peft, dimensions, BASE, seed=1, layout=Layout(1))
            found[name] = "accepted"
        except CheckpointError as error:
            found[name] = str(error)
    return found
