"""The name of a set of weights: a hash of their content, however the files are cut and whoever reads them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from nemo_dpo.checkpoint.weights import Chunk, Weights, read_weights
from nemo_dpo.parallel.collective import agree, gather

# `layers.` without a number: the layers are stacked, [layers, …].
STACKED = re.compile(r"\blayers\.(?!\d)")
# Below the vocabulary these have rows of zeros, as many as the tensor-parallel size of their last writer asked for.
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


class Piece(NamedTuple):
    """What is read and hashed at a time: a parameter, or one layer of a stacked one."""

    name: str
    layer: int | None


def weights_hash(folder: Path) -> str:
    """SHA-256 of the names, shapes, dtypes and values of all tensors in a `model_weights/` folder, in hexadecimal.

    The same for the same tensors, by whichever layout they were written: the zeros that pad a vocabulary are left out.
    Where there are ranks it is collective: each
    hashes its share of the tensors. In memory is one layer's part of one tensor at a time.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    if not dist.is_initialized():
        weights = read_weights(folder)
        return _combined(_digests(weights, pieces(weights)))
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = gather(agree(lambda: _share(folder, rank, world)))
    return _combined({piece: digest for share in shares for piece, digest in share.items()})


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """The same of tensors in memory."""
    return _combined({Piece(name, None): _digest(Piece(name, None), tensor) for name, tensor in tensors.items()})


def chunks_hash(chunks: Iterable[Chunk]) -> str:
    """The same of chunks that are about to be written, or as good as; each is asked for once."""
    digests = {}
    for chunk in chunks:
        piece = Piece(chunk.name, chunk.layer)
        digests[piece] = _digest(piece, chunk.tensor)
        del chunk  # or it would live on while the next one is made
    return _combined(digests)


def _share(folder: Path, rank: int, world: int) -> dict[Piece, str]:
    weights = read_weights(folder)
    by_size = sorted(pieces(weights), key=lambda piece: (_numel(weights, piece), piece.name, piece.layer or 0))
    return _digests(weights, by_size[rank::world])


def pieces(weights: Weights) -> list[Piece]:
    """Everything in `weights`, piece by piece."""
    return [
        Piece(name, layer)
        for name in weights
        for layer in (range(weights.shape(name)[0]) if STACKED.search(name) else [None])
    ]


def _numel(weights: Weights, piece: Piece) -> int:
    shape = weights.shape(piece.name)
    return shape.numel() if piece.layer is None else shape[1:].numel()


def _digests(weights: Weights, pieces: Sequence[Piece]) -> dict[Piece, str]:
    return {
        piece: _digest(piece, weights[piece.name] if piece.layer is None else weights.layer(piece.name, piece.layer))
        for piece in pieces
    }


def _digest(piece: Piece, tensor: torch.Tensor) -> str:
    if piece.name.endswith(PADDED):
        tensor = tensor[: _rows_in_use(tensor)]
    header = json.dumps([*piece, str(tensor.dtype), list(tensor.shape)])
    values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(header.encode() + hashlib.sha256(values.data).digest()).hexdigest()


def _rows_in_use(tensor: torch.Tensor) -> int:
    used = tensor.any(dim=1).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def _combined(digests: dict[Piece, str]) -> str:
    """Of all pieces, in an order that depends on nothing else."""
    return hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()
