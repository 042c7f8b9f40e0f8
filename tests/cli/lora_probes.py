"""What a run with adapters held, seen from inside; for `run_cli(patches=…)`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.probes import Facts, log_dir, wrap


def read(folder: Path) -> list[Facts]:
    """What each rank has written, by rank."""
    files = sorted((folder / "lora_facts").iterdir(), key=lambda file: int(file.stem))
    return [json.loads(file.read_text()) for file in files]


def watch() -> None:
    """Leave lora_facts/<rank>.json.

    adapter: shapes of the tensors beside the first chunk's first QKV weight. trained: names of parameters that ask for
    a gradient. with_gradient: names of those that have a gradient buffer. base: hash of the frozen weights before the
    first and after the last step. off: hash of the log-probs of a batch with the adapter off, before and after.
    """
    from nemo_dpo import app
    from nemo_dpo.parallel.engine import Engine
    from nemo_dpo.reference.adapter import AdapterReference
    from nemo_dpo.training.module import PreferenceModule

    facts: Facts = {"base": [], "off": []}
    seen: dict[str, Any] = {}

    def built(init: Callable[..., None], engine: Engine, *args: Any) -> None:
        init(engine, *args)
        seen["engine"] = engine
        facts.update(_facts(engine))

    def stepped(step: Callable[..., None], module: Any, batch: Any, number: int) -> None:
        if "batch" not in seen:
            seen["batch"] = batch
            note()
        step(module, batch, number)

    def note() -> None:
        engine = seen["engine"]
        frozen = [p for chunk in engine.chunks for p in chunk.parameters() if not p.requires_grad]
        facts["base"].append(_hash(frozen))
        facts["off"].append(_hash(AdapterReference(engine, None).logps(seen["batch"])))

    def trained(train: Callable[..., int], cfg: Any) -> int:
        status = train(cfg)
        folder = log_dir() / "lora_facts"
        folder.mkdir(exist_ok=True)
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
        return status

    def finished(finish: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        note()
        finish(*args, **kwargs)

    wrap(Engine, "__init__", built)
    wrap(PreferenceModule, "training_step", stepped)
    wrap(app, "finish", finished)
    wrap(app, "train", trained)


def _facts(engine: Any) -> Facts:
    named = [pair for chunk in engine.chunks for pair in chunk.named_parameters()]
    first = "decoder.layers.0.self_attention.linear_qkv.adapters.policy."
    return {
        "chunks": [len(chunk.decoder.layers) for chunk in engine.chunks],
        "adapter": {name.removeprefix(first): list(p.shape) for name, p in named if name.startswith(first)},
        "trained": [name for name, p in named if p.requires_grad],
        "with_gradient": [name for name, p in named if getattr(p, "main_grad", None) is not None],
    }


def _hash(tensors: list[Any]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).float().numpy().tobytes())
    return digest.hexdigest()
