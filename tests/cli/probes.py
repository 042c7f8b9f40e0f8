"""Functions for `run_cli(patches=…)`: they watch a run.

They change the process that the ranks are forked from, so every rank is watched.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


def read_facts(log_dir: Path) -> list[Facts]:
    """What each rank of a run under `watch` has written, by rank."""
    files = sorted((log_dir / "facts").iterdir(), key=lambda file: int(file.stem))
    return [json.loads(file.read_text()) for file in files]


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace the function `owner.name` by one that calls `around(original, …)`."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(lambda *args, **kwargs: around(original, *args, **kwargs)))


def log_dir() -> Path:
    """The folder of this process's run."""
    key = "exp_manager.explicit_log_dir="
    return Path(next(word.removeprefix(key) for word in sys.argv if word.startswith(key)))


def watch() -> None:
    """Leave facts/<rank>.json: the layout that came about, what each step ran on, and every pair's log-probs.

    groups: ranks in tp, pp and dp. chunks: layers of each model chunk. qkv: local shape of a QKV weight.
    steps: for each micro-batch of each step, its pairs. calls: forward passes of layers and of attention in training
    mode (the reference and validation run in eval mode). lengths: [S of the tokens, S of a layer's input].
    logps: [steps begun, policy's, reference's] of each micro-batch. optimizer_values: numbers in Adam's first moment.
    """
    from nemo_dpo import app
    from nemo_dpo.parallel.engine import Engine
    from nemo_dpo.training import step

    facts: Facts = {"steps": [], "logps": []}
    engines: list[Engine] = []

    def built(init: Callable[..., None], engine: Engine, *args: Any) -> None:
        init(engine, *args)
        engines.append(engine)
        facts.update(_layout(engine), **_count_calls(engine))

    def stepped(run: Callable[..., Any], engine: Engine, micro_batches: Any, forward: Any) -> Any:
        facts["steps"].append([batch.num_pairs for batch in micro_batches])
        return run(engine, micro_batches, forward)

    def compared(stats: Callable[..., Any], batch: Any, logps: Any, ref_logps: Any) -> Any:
        facts["logps"].append([len(facts["steps"]), logps.tolist(), ref_logps.tolist()])
        return stats(batch, logps, ref_logps)

    def trained(train: Callable[..., int], cfg: Any) -> int:
        status = train(cfg)
        facts["optimizer_values"] = _optimizer_values(engines[0])
        facts["lengths"] = sorted(facts["lengths"])
        folder = log_dir() / "facts"
        folder.mkdir(exist_ok=True)
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
        return status

    wrap(Engine, "__init__", built)
    wrap(Engine, "forward_backward", stepped)
    wrap(step, "pair_stats", compared)
    wrap(app, "train", trained)


def watch_options() -> None:
    """Leave facts/<rank>.json: the options of the optimizer's parameter groups that each update is made with."""
    from nemo_dpo.parallel.engine import Engine

    facts: list[Any] = []

    def updated(update: Callable[..., float], engine: Engine, *args: Any, **kwargs: Any) -> float:
        facts.append([_options(group) for group in engine.optimizer.param_groups])
        folder = log_dir() / "facts"
        folder.mkdir(exist_ok=True)
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
        return update(engine, *args, **kwargs)

    wrap(Engine, "update", updated)


def _options(group: Facts) -> Facts:
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _layout(engine: Any) -> Facts:
    groups = engine.groups
    weights = dict(engine.chunks[0].named_parameters())
    return {
        "groups": [groups.tp.size(), groups.pp.size(), groups.dp.size()],
        "chunks": [len(chunk.decoder.layers) for chunk in engine.chunks],
        "qkv": list(weights["decoder.layers.0.self_attention.linear_qkv.weight"].shape),
        "parameters": sum(p.numel() for chunk in engine.chunks for p in chunk.parameters()),
        "dtype": str(next(iter(weights.values())).dtype),
    }


def _count_calls(engine: Any) -> Facts:
    calls: Counter[str] = Counter()
    lengths: set[tuple[int, int]] = set()
    tokens: list[int] = [0]

    def count(name: str) -> Callable[..., None]:
        return lambda module, *_: calls.update({name: int(module.training)})

    def note_length(_module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        lengths.add((tokens[0], hidden.shape[0]))

    for chunk in engine.chunks:
        chunk.register_forward_pre_hook(lambda _, args: tokens.__setitem__(0, args[0].shape[1]))
        for layer in chunk.decoder.layers:
            layer.register_forward_pre_hook(note_length, with_kwargs=True)
            layer.register_forward_hook(count("layer"))
            layer.self_attention.core_attention.register_forward_hook(count("attention"))
    return {"calls": calls, "lengths": lengths}


def _optimizer_values(engine: Any) -> int:
    parts = [part.optimizer.state for part in engine.optimizer.chained_optimizers]
    return sum(state["exp_avg"].numel() for part in parts for state in part.values() if "exp_avg" in state)
