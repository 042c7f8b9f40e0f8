"""Training checkpoints and model weights as megatron-core distributed checkpoints.

A checkpoint is written under a temporary name and renamed when it is complete: a folder under its final name is whole.
It may be loaded under any tp, pp and dp.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from nemo_dpo.checkpoint import CheckpointError, manifest
from nemo_dpo.checkpoint.folders import PROGRESS, next_save, read_progress
from nemo_dpo.checkpoint.stored import plain_names
from nemo_dpo.checkpoint.weights import TorchDistWeights, check_metadata_pickle, stored_names
from nemo_dpo.checkpoint.writing import Writing, reason
from nemo_dpo.parallel.collective import agree, on_rank_zero
from nemo_dpo.parallel.engine import Engine
from nemo_dpo.parallel.watch import is_lost

logger = logging.getLogger(__name__)

LAYERS = "decoder.layers."


def save(
    folder: Path, engine: Engine, trainer_state: dict[str, Any], progress: dict[str, Any], *, background: bool = False
) -> Writing:
    """Begin to write everything a run needs to go on: weights, optimizer, generators, the trainer's own state.

    Collective. The checkpoint has its name, and a manifest, when the caller has called `finish` on what is returned.

    Args:
        folder: final name; an existing checkpoint there is replaced once the new one is complete.
        trainer_state: Lightning's dictionary (schedule, loops, callbacks).
        progress: plain numbers and strings, also written as progress.json, where the number of this save is added.
        background: leave the writing to a fork of each rank; see `Writing`.

    Raises:
        SaveError: it cannot be written; nothing is left behind under the final name.
    """
    weights = engine.sharded_weights()
    progress = {**progress, "save": on_rank_zero(lambda: next_save(folder.parent))}
    state = {
        **weights,
        "optimizer": engine.sharded_optimizer(weights),
        "rng": _rng_object(engine),
        "trainer": trainer_state,
        "progress": progress,
    }
    return Writing(folder, state, {PROGRESS: json.dumps(progress, indent=1)}, background=background)


def check(folder: Path) -> int:
    """Read all files of a checkpoint, each rank its share, and compare them with the manifest. Collective.

    Returns:
        The bytes of the checkpoint.

    Raises:
        CheckpointError: naming the file that is not what was written, and what is wrong with it.
    """
    entries = on_rank_zero(lambda: manifest.read(folder))
    agree(lambda: manifest.check(folder, manifest.share(entries, dist.get_rank(), dist.get_world_size())))
    return manifest.total(entries)


def load(folder: Path, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore weights, optimizer and generators in place; return (trainer_state, progress). Collective.

    The generators' states are restored under the layout they were saved from; under another they start from the seed.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or one of another model.
    """
    progress = read_progress(folder)
    same_layout = progress["layout"] == layout_of(engine)
    weights = engine.sharded_weights()
    state: dict[str, Any] = {**weights, "optimizer": engine.sharded_optimizer(weights, loading=True)}
    if same_layout:
        state["rng"] = _rng_object(engine)
    loaded = _load_sharded(state, folder)
    engine.load_weights(loaded)
    engine.load_optimizer(loaded["optimizer"])
    if same_layout:
        _restore_rng(loaded["rng"])
    else:
        logger.info(
            "layout changed from %s to %s: dropout starts from the seed again", progress["layout"], layout_of(engine)
        )
    return loaded["trainer"], progress


def save_weights(folder: Path, engine: Engine) -> None:
    """Write the weights alone, keys behind `model.`, as a `.nemo` archive holds them. Collective."""
    state = {name: _tensors_only(part) for name, part in engine.sharded_weights("model.").items()}
    Writing(folder, state, {}, background=False).finish()


def load_weights(folder: Path, engine_chunks: list[Any]) -> None:
    """Fill freshly built chunks from the `model_weights/` folder of a `.nemo` archive. Collective.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    _fill(folder, engine_chunks, lambda _name: True)


def load_by_layer(folder: Path, engine_chunks: list[Any], device: torch.device) -> Iterator[torch.nn.Module]:
    """As `load_weights`, yielding each transformer layer when it is filled; until then it may be on the meta device.

    So a consumer that shrinks each layer never has the whole model in memory. megatron-core cannot load one layer of a
    stacked parameter; every rank reads its own part. Collective: pipeline ranks have equally many layers.
    """
    _fill(folder, engine_chunks, lambda name: not name.startswith(LAYERS))
    stored = agree(lambda: TorchDistWeights(folder))
    names = plain_names(stored, folder)
    for chunk in engine_chunks:
        entries = _entries(chunk, names, methodcaller("startswith", LAYERS))
        for number, layer in enumerate(chunk.decoder.layers):
            layer.to_empty(device=device)
            prefix = f"model.{LAYERS}{number}."
            own = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
            agree(partial(_fill_layer, layer, own, stored))
            yield layer


def _fill(folder: Path, engine_chunks: list[Any], wanted: Callable[[str], bool]) -> None:
    """Load the parameters whose names are `wanted`."""
    names = stored_names(folder)
    state = {f"model{n}": _entries(chunk, names, wanted) for n, chunk in enumerate(engine_chunks)}
    loaded = _load_sharded(state, folder)
    for n, chunk in enumerate(engine_chunks):
        part = loaded.get(f"model{n}", {})  # megatron-core drops a chunk of which nothing is wanted
        own = {name.removeprefix("model."): tensor for name, tensor in part.items()}
        missing, unexpected = chunk.load_state_dict(own, strict=False)
        absent = [name for name in missing if wanted(name) and not name.endswith("_extra_state")]
        if absent or unexpected:
            raise CheckpointError(f"{folder}: weights do not fit the model: missing {absent}, unexpected {unexpected}")


def _fill_layer(layer: torch.nn.Module, entries: dict[str, Any], stored: TorchDistWeights) -> None:
    own = {}
    for name, entry in entries.items():
        if isinstance(entry, ShardedTensorFactory):  # of a gated layer: a rank's rows are in two places
            own[name] = entry.merge_fn([_stored_part(stored, piece) for piece in entry.build()])
        else:
            own[name] = _stored_part(stored, entry)
    layer.load_state_dict(own)


def _stored_part(stored: TorchDistWeights, entry: ShardedTensor) -> torch.Tensor:
    if entry.key not in stored or tuple(stored.shape(entry.key)) != tuple(entry.global_shape):
        found = list(stored.shape(entry.key)) if entry.key in stored else "missing"
        raise CheckpointError(f"weights do not fit the model: {entry.key} is {found}, not {list(entry.global_shape)}")
    stack = [1] * entry.prepend_axis_num
    return stored.part(entry.key, entry.global_offset, [*stack, *entry.local_shape]).view(entry.local_shape)


def _entries(chunk: Any, names: dict[str, str], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """megatron-core's description of the chunk's `wanted` weights, keys behind `model.`, as `names` calls them."""
    entries = _tensors_only(chunk.sharded_state_dict(prefix="model."))
    for entry in entries.values():
        entry.key = names.get(entry.key, entry.key)
    return {name: entry for name, entry in entries.items() if wanted(name.removeprefix("model."))}


def layout_of(engine: Engine) -> dict[str, int]:
    """The part of the layout that decides which generator belongs to which rank."""
    layout = engine.groups.layout
    return {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "vpp": layout.vpp or 1}


def _load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    check_metadata_pickle(folder)
    try:
        return dict(dist_checkpointing.load(state, str(folder)))
    except (OSError, RuntimeError, KeyError, CheckpointingException, CheckpointException) as error:
        if is_lost(error):  # a rank is gone, and nothing wrong with the checkpoint
            raise
        raise CheckpointError(f"{folder} cannot be loaded into this model: {reason(error)}") from error


def _tensors_only(part: dict[str, Any]) -> dict[str, Any]:
    # Transformer Engine's fp8 `_extra_state` is no weight, and archives do not hold it.
    return {
        name: entry
        for name, entry in part.items()
        if isinstance(entry, ShardedTensor) or not name.endswith("_extra_state")
    }


def _rng_object(engine: Engine) -> ShardedObject:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tensor_parallel": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    world = engine.groups.layout.world
    return ShardedObject("rng", states, (world,), (engine.groups.rank,), replica_id=0)


def _restore_rng(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tensor_parallel"])
