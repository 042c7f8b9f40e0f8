"""Read and write the folder `model_weights/` of a `.nemo` archive in a single process, without megatron-core.

The folder is a megatron-core distributed checkpoint of kind `torch_dist`: tensors in `*.distcp` files, a pickled index
in `.metadata`. Parameters of the transformer layers are stacked, `[layers, …]` under a key without the layer's number,
one chunk a layer; megatron-core loads such a folder at any tensor- or pipeline-parallel size.

Writing streams: one chunk is in memory at a time. Reading is lazy: a parameter, or one layer of it, at a time. No
pickle is executed: the index is read by an unpickler that knows the index's own classes only, tensors with
`weights_only`.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_dpo.checkpoint import CheckpointError, SaveError, torch_file, why
from nemo_dpo.checkpoint.stored import Respelled, Weights, plain_names
from nemo_dpo.checkpoint.tar import Section, Span
from nemo_dpo.checkpoint.zarr_weights import ZarrWeights

METADATA = ".metadata"
DATA_FILE = "__0_0.distcp"
FORMAT_FILE = "metadata.json"
COMMON_FILE = "common.pt"
ZARR = "zarr"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_ALLOWED = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}  # fmt: skip
_EMPTY_CLASSES = {"megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"}}


# What unpickling, or looking at what came of it, raises on bytes that were not written by torch.
_DAMAGED_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    ImportError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Chunk:
    """One piece of a checkpoint: a whole parameter, or one layer's part of a stacked one.

    Attributes:
        name: the key in the checkpoint, e.g. `model.decoder.layers.mlp.linear_fc2.weight`.
        tensor: the values, of the shape of one layer if `layer` is given.
        layer: which layer (0 … num_layers − 1) of a stacked parameter; None for a parameter that is not stacked.
        num_layers: number of layers of a stacked parameter.
    """

    name: str
    tensor: torch.Tensor
    layer: int | None = None
    num_layers: int = 0


@dataclass
class _Stored:
    """What is known of one parameter while its chunks arrive."""

    dtype: torch.dtype
    size: torch.Size
    chunks: dict[torch.Size, ChunkStorageMetadata] = field(default_factory=dict)


def write_weights(folder: Path, chunks: Iterable[Chunk]) -> None:
    """Write `chunks` as the distributed checkpoint `folder`, which is created; see `stream_weights`."""
    folder.mkdir(parents=True)
    stream_weights(lambda name: (folder / name).open("wb"), chunks)


def stream_weights(create: Callable[[str], AbstractContextManager[IO[bytes]]], chunks: Iterable[Chunk]) -> None:
    """Write `chunks` as a distributed checkpoint; they are taken and written one by one.

    Args:
        create: opens a new file of the checkpoint's folder for writing, by its name; one is open at a time.
        chunks: the parameters, in any order.

    Raises:
        CheckpointError: a chunk comes twice, differs from its stack in shape or dtype, or a stack is incomplete.
        SaveError: it cannot be written.
    """
    stored: dict[str, _Stored] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    with create(DATA_FILE) as file:
        for chunk in chunks:
            offsets = _register(stored, chunk)
            start = file.tell()
            _save(chunk.tensor if chunk.layer is None else chunk.tensor[None], file)
            storage[MetadataIndex(chunk.name, offsets)] = _StorageInfo(DATA_FILE, start, file.tell() - start)
            del chunk  # or it would live on while the next one is made
    metadata = Metadata({name: _finished(name, parameter) for name, parameter in stored.items()}, storage_data=storage)
    with create(METADATA) as file:
        pickle.dump(metadata, file)
    with create(COMMON_FILE) as file:
        torch.save({}, file)
    with create(FORMAT_FILE) as file:
        file.write(json.dumps(FORMAT).encode())


def _save(tensor: torch.Tensor, file: IO[bytes]) -> None:
    own = tensor.detach().cpu().contiguous()
    if own.untyped_storage().nbytes() != own.nbytes:  # a view would drag in its whole storage
        own = own.clone()
    try:
        torch.save(own, file)
    except RuntimeError as error:  # what torch makes of a failed write
        cause = error.__context__
        reason = why(cause) if isinstance(cause, OSError) else torch_file.reason(error)
        raise SaveError(f"{file.name}: cannot be written ({reason})") from error


def _register(stored: dict[str, _Stored], chunk: Chunk) -> torch.Size:
    """Note the chunk's place in its parameter; returns its offsets there."""
    shape = tuple(chunk.tensor.shape)
    size = torch.Size(shape if chunk.layer is None else (chunk.num_layers, *shape))
    offsets = torch.Size([0] * len(size) if chunk.layer is None else [chunk.layer, *[0] * len(shape)])
    parameter = stored.setdefault(chunk.name, _Stored(chunk.tensor.dtype, size))
    if (parameter.dtype, parameter.size) != (chunk.tensor.dtype, size):
        raise CheckpointError(
            f"{chunk.name}: layer {chunk.layer} is {chunk.tensor.dtype} {list(size)}, others are {parameter.dtype} "
            f"{list(parameter.size)}; a stack needs one shape and one dtype (set the precision to convert to)"
        )
    if offsets in parameter.chunks:
        raise CheckpointError(f"{chunk.name}: layer {chunk.layer} is written twice")
    parameter.chunks[offsets] = ChunkStorageMetadata(offsets, size if chunk.layer is None else torch.Size((1, *shape)))
    return offsets


def _finished(name: str, parameter: _Stored) -> TensorStorageMetadata:
    if sum(chunk.sizes.numel() for chunk in parameter.chunks.values()) != parameter.size.numel():
        raise CheckpointError(f"{name}: {len(parameter.chunks)} of {parameter.size[0]} layers are written")
    return TensorStorageMetadata(TensorProperties(parameter.dtype), parameter.size, list(parameter.chunks.values()))


class _Placeholder:
    """Stands for the two empty classes of megatron-core that some indexes name, so that it need not be imported."""


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the classes that an index is made of, and nothing else."""

    def __init__(self, file: IO[bytes], source: Traversable) -> None:
        super().__init__(file)
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if name in _EMPTY_CLASSES.get(module, ()):
            return _Placeholder
        raise CheckpointError(
            f"{self._source}: its index asks for '{module}.{name}', which no checkpoint needs; not trusted"
        )


def check_metadata_pickle(folder: Traversable) -> Metadata:
    """Read the index of the distributed checkpoint `folder` safely, and check it against the files beside it.

    torch and megatron-core unpickle `.metadata` without restraint and follow the file names in it: call this before
    they see a folder from outside.

    Raises:
        CheckpointError: no `torch_dist` checkpoint, classes that do not belong there, file names that lead elsewhere,
            missing or truncated data files, tensors larger than the files that hold them.
    """
    _check_format(folder)
    try:
        raw = (folder / METADATA).read_bytes()
        _check_memo(raw)
        metadata = _IndexUnpickler(io.BytesIO(raw), folder).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise CheckpointError(f"{folder}: {METADATA} is not the index of a distributed checkpoint")
        _check_files(folder, metadata)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{folder}: {METADATA} cannot be read ({error.strerror})") from error
    except _DAMAGED_PICKLE as error:
        raise CheckpointError(f"{folder}: {METADATA} is damaged ({error}); copy the checkpoint again") from error
    return metadata


def _check_memo(raw: bytes) -> None:
    """Refuse numbers of memorised objects beyond what `raw` can hold: the unpickler makes a table of that length."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(raw):
            raise ValueError(f"object number {argument} in {len(raw)} bytes")


def _check_format(folder: Traversable) -> None:
    kind = kind_of(folder)
    if kind != FORMAT["sharded_backend"]:
        raise CheckpointError(
            f"{folder}: kind '{kind}' cannot be read here, only '{FORMAT['sharded_backend']}'; rewrite the checkpoint "
            "with tools/convert/convert_gpt_nemo_to_mcore.py"
        )


def kind_of(folder: Traversable) -> str:
    """The kind of the distributed checkpoint `folder`: `torch_dist`, or `zarr` as megatron-core once wrote.

    Raises:
        CheckpointError: it does not say.
    """
    file = folder / FORMAT_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: holds no {FORMAT_FILE}; it is not a megatron-core distributed checkpoint")
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["sharded_backend"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable ({error}); copy the checkpoint again") from error


def _check_files(folder: Traversable, metadata: Metadata) -> None:
    infos = metadata.storage_data.values()
    names = {info.relative_path for info in infos}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder}: its index names the file {name!r} outside the folder; not trusted")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: data file {name} is missing; copy the checkpoint again")
    sizes = {name: _size(folder / name) for name in names}
    inside = (0 <= info.offset <= info.offset + info.length <= sizes[info.relative_path] for info in infos)
    if not all(inside):
        raise CheckpointError(f"{folder}: a data file is truncated; copy the checkpoint again")
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            claimed = entry.size.numel() * entry.properties.dtype.itemsize
            if claimed > sum(sizes.values()):
                raise CheckpointError(f"{folder}: {key} claims {claimed} bytes, more than its files hold; not trusted")


def _size(file: Traversable) -> int:
    with file.open("rb") as opened:
        return int(opened.seek(0, 2))


class TorchDistWeights(Weights):
    """The tensors of a checkpoint of kind `torch_dist`."""

    def __init__(self, folder: Traversable) -> None:
        """Read and check the index of `folder`; see `check_metadata_pickle` for what is refused."""
        metadata = check_metadata_pickle(folder)
        self._folder = folder
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        entries = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._chunks = {
            key: {(*chunk.offsets, *chunk.sizes): chunk for chunk in entry.chunks}
            for key, entry in self._tensors.items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.part(name, [0] * len(self.shape(name)), self.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def layer(self, name: str, index: int) -> torch.Tensor:
        size = self.shape(name)
        return self.part(name, [index, *[0] * (len(size) - 1)], [1, *size[1:]])[0]

    def part(self, name: str, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """The box of a parameter that begins at `start` with `size`, from the chunks that overlap it."""
        if (whole := self._chunks[name].get((*start, *size))) is not None:
            return self._load(name, whole)  # the usual case, without a copy
        result = torch.empty(tuple(size), dtype=self.dtype(name))
        filled = 0
        for chunk in self._tensors[name].chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            ends = zip(start, size, chunk.offsets, chunk.sizes, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self._load(name, chunk)[_slices(low, high, chunk.offsets)]
            result[_slices(low, high, start)] = part
            filled += part.numel()
        if filled != result.numel():
            raise CheckpointError(f"{self._folder}: {name}: {filled} of {result.numel()} values are there")
        return result

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        info = self._storage.get(MetadataIndex(name, chunk.offsets))
        if info is None or info.transform_descriptors:
            raise CheckpointError(f"{self._folder}: {name} is not stored, or in a compressed form that cannot be read")
        with (self._folder / info.relative_path).open("rb") as file:
            part = io.BufferedReader(Section(file, Span(info.offset, info.length)))
            tensor = torch_file.load(part, f"{self._folder}: {name}")
        if not isinstance(tensor, torch.Tensor) or (tensor.shape, tensor.dtype) != (chunk.sizes, self.dtype(name)):
            raise CheckpointError(f"{self._folder}: {name} is not the tensor that the index promises")
        return tensor


def read_weights(folder: Traversable) -> Weights:
    """The tensors of the distributed checkpoint `folder`, on disk or inside a tar, lazily, under their plain names."""
    stored = _read_kind(folder)
    names = plain_names(stored, folder)
    return stored if all(plain == name for plain, name in names.items()) else Respelled(stored, names)


def stored_names(folder: Path) -> dict[str, str]:
    """Plain name → name in the `torch_dist` checkpoint `folder`, of all that is in it."""
    return plain_names(check_metadata_pickle(folder).state_dict_metadata, folder)


def _read_kind(folder: Traversable) -> Weights:
    if kind_of(folder) != ZARR:
        return TorchDistWeights(folder)
    if not isinstance(folder, Path):
        raise CheckpointError(f"{folder}: a checkpoint of kind '{ZARR}' can be read from a folder only; unpack it")
    return ZarrWeights(folder)


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
