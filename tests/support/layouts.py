"""Older layouts of weights, written without this package: NeMo's one file, and zarr as megatron-core wrote it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_one_file(folder: Path, stored: Mapping[str, Tensor]) -> None:
    """`model_weights.ckpt` of a distributed checkpoint's tensors: each layer of a stack under a name of its own."""
    state: dict[str, Any] = {}
    for name, tensor in stored.items():
        if "layers." in name:
            state |= {name.replace("layers.", f"layers.{n}."): layer.clone() for n, layer in enumerate(tensor)}
        else:
            state[name] = tensor
    state["model.decoder.layers.0.self_attention.core_attention._extra_state"] = None
    torch.save(state, folder / "model_weights.ckpt")


def write_ranks(folder: Path, stored: Mapping[str, Tensor], tp: int, pp: int, local_names: bool = False) -> None:
    """Folders of tp × pp ranks, as megatron-core's own modules have their parameters; gated MLP, no biases.

    Args:
        local_names: of the norms, and megatron_amp_O2's prefix.
    """
    layers = next(tensor.shape[0] for name, tensor in stored.items() if "layers." in name) // pp
    for stage, rank in itertools.product(range(pp), range(tp)):
        state: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            if "layers." in name:
                for n in range(layers):
                    part = _rank_part(name, tensor[stage * layers + n], rank, tp)
                    state[name.replace("layers.", f"layers.{n}.")] = part
            elif stage == (0 if "embedding" in name else pp - 1):
                state[name] = _rank_part(name, tensor, rank, tp)
        if local_names:
            state = {_local_name(name): tensor for name, tensor in state.items()}
        target = folder / (f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}")
        target.mkdir()
        torch.save(state, target / "model_weights.ckpt")


def _rank_part(name: str, tensor: Tensor, rank: int, tp: int) -> Tensor:
    if "norm" in name:
        return tensor.clone()
    if "linear_fc1" in name:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    return tensor.chunk(tp, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0)[rank].clone()


def _local_name(name: str) -> str:
    return local_norm(name).replace("model.", "model.module.", 1)


def local_norm(name: str) -> str:
    """As megatron-core's own layers name the norms, in torch_dist as one version of NeMo's converter left them."""
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def write_local_names(folder: Path, stored: Mapping[str, Tensor]) -> None:
    """A torch_dist checkpoint in which the norms have those names."""
    from nemo_dpo.checkpoint.weights import Chunk, write_weights

    chunks = [
        chunk
        for name, tensor in stored.items()
        for chunk in (
            [Chunk(local_norm(name), part, n, len(tensor)) for n, part in enumerate(tensor)]
            if "layers." in name
            else [Chunk(name, tensor)]
        )
    ]
    assert {chunk.name for chunk in chunks} != set(stored)
    write_weights(folder, chunks)


def write_local_zarr(folder: Path, stored: Mapping[str, Tensor]) -> None:
    """A zarr checkpoint in which the norms have those names."""
    write_zarr(folder, {local_norm(name): tensor for name, tensor in stored.items()})


def write_zarr(folder: Path, stored: Mapping[str, Tensor], ranks: int = 1) -> None:
    """A checkpoint of kind zarr; the second dimension of stacked tensors is cut into `ranks` chunks."""
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    for name, tensor in stored.items():
        chunks = [1, -(-tensor.shape[1] // ranks), *tensor.shape[2:]] if "layers." in name else list(tensor.shape)
        write_array(folder / name, tensor, chunks)
    extra = folder / "model.decoder.layers.self_attention.core_attention._extra_state"
    extra.mkdir()
    (extra / "shard_0_1.pt").write_bytes(b"an object, no tensor")


def write_array(folder: Path, tensor: Tensor, chunks: Sequence[int]) -> None:
    """One array, uncompressed; chunks at the edge have their full size."""
    folder.mkdir()
    brain = tensor.dtype is torch.bfloat16
    values = (tensor.view(torch.int16) if brain else tensor).numpy()
    described = {
        "chunks": list(chunks),
        "compressor": None,
        "dtype": "bfloat16" if brain else values.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(tensor.shape),
        "zarr_format": 2,
    }
    (folder / ".zarray").write_text(json.dumps(described))
    counts = [range(-(-whole // part)) for whole, part in zip(tensor.shape, chunks, strict=True)]
    for place in itertools.product(*counts):
        inside = values[tuple(slice(n * part, (n + 1) * part) for n, part in zip(place, chunks, strict=True))]
        full = torch.zeros(tuple(chunks), dtype=torch.int16 if brain else tensor.dtype).numpy()
        full[tuple(slice(0, size) for size in inside.shape)] = inside
        (folder / ".".join(map(str, place))).write_bytes(full.tobytes())
