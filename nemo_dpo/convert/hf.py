"""Hugging Face folders: read weights lazily from safetensors or `.bin` files, write safetensors shard by shard."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, SaveError

MAX_SHARD_BYTES = 4 * 10**9
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")


class HfWeights(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by name, each read from its file when asked for. Use as a context manager.

    One file is open at a time: tables ask layer by layer, as the files are laid out.
    """

    def __init__(self, folder: Path, files: Sequence[str] = MODEL_FILES) -> None:
        """Find the first of `files` that is in `folder`, whole or in shards with an index.

        Raises:
            CheckpointError: there is none, or the index names missing ones.
        """
        self._folder = folder
        self._candidates = files
        self._open_name = ""
        self._open_file: Any = None
        self._stack = contextlib.ExitStack()
        self._files = self._locate()

    def __enter__(self) -> HfWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        file = self._file(self._files[name])
        try:
            tensor: Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        except KeyError as error:
            raise CheckpointError(f"{self._folder / self._files[name]}: lacks {name}, which the index names") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _locate(self) -> dict[str, str]:
        for single in self._candidates:
            index = self._folder / f"{single}.index.json"
            if index.is_file():
                return self._from_index(index)
            if (self._folder / single).is_file():
                return dict.fromkeys(self._names(single), single)
        raise CheckpointError(
            f"{self._folder}: holds no weights ({' or '.join(self._candidates)}, whole or with an index)"
        )

    def _from_index(self, index: Path) -> dict[str, str]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{index}: has no weight_map")
        for name in sorted(set(map(str, files.values()))):
            if Path(name).name != name or not (self._folder / name).is_file():
                raise CheckpointError(
                    f"{index}: names {name!r}, which is not in the folder; the download is incomplete"
                )
        return {str(name): str(file) for name, file in files.items()}

    def _names(self, file: str) -> list[str]:
        opened = self._file(file)
        return list(opened if isinstance(opened, dict) else opened.keys())

    def _file(self, name: str) -> Any:
        """A dict of tensors (.bin) or an open safetensors file."""
        if name != self._open_name:
            self._stack.close()
            self._open_file, self._open_name = self._opened(self._folder / name), name
        return self._open_file

    def _opened(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            if path.suffix == ".safetensors":
                return self._stack.enter_context(safe_open(path, framework="pt"))
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{path}: truncated or damaged ({str(error).splitlines()[0]}); copy it again"
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object, or raise CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write as transformers does: two spaces, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or several shards with an index if there is more than `max_shard_bytes`.

    At most one shard is in memory.
    """
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        save_safetensors(shard, folder / f"shard-{len(shards)}")
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file, with the metadata that transformers and PEFT ask for."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise SaveError(f"{path.parent}: cannot be written ({error}); is the disk full?") from error
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def local_folder(name_or_path: str) -> Path:
    """A folder as it is; a hub id (`organisation/name`) is downloaded first, where there is a network.

    Raises:
        CheckpointError: neither a folder nor a model that can be downloaded.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path) or name_or_path.startswith("."):
        raise CheckpointError(f"{name_or_path}: no such folder, and not a hub id of the form organisation/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name_or_path}: no such folder, and no model of that name can be downloaded") from error
