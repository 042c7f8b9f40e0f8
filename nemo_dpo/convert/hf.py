"""Hugging Face folders: read weights lazily from safetensors or `.bin` files, write safetensors shard by shard."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, SaveError
from nemo_dpo.checkpoint.torch_file import is_older, load_tensors
from nemo_dpo.convert.safetensors_file import Entry, SafetensorsFile, write_file
from nemo_dpo.json_file import parse_object
from nemo_dpo.tokenizer import TEMPLATES

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4 * 10**9
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")


class HfWeights(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by name, each read from its file when asked for.

    safetensors are read into memory of their own. A `.bin` file is mapped, one at a time: what has been read of it
    counts as memory until the next one is opened, but the system takes it back where memory is short.
    """

    def __init__(self, folder: Path, files: Sequence[str] = MODEL_FILES) -> None:
        """Find the first of `files` that is in `folder`, whole or in shards with an index.

        Raises:
            CheckpointError: there is none, or the index names missing ones.
        """
        self._folder = folder
        self._candidates = files
        self._opened: dict[str, Mapping[str, Tensor]] = {}
        self._files = self._locate()

    def __getitem__(self, name: str) -> Tensor:
        return self._holder(name)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor; reads no data."""
        file = self._holder(name)
        return file.entry(name).dtype if isinstance(file, SafetensorsFile) else file[name].dtype

    @property
    def files(self) -> list[str]:
        """Names of the files, in the order of their tensors."""
        return list(dict.fromkeys(self._files.values()))

    def _locate(self) -> dict[str, str]:
        for single in self._candidates:
            index = self._folder / f"{single}.index.json"
            if index.is_file():
                return self._from_index(index)
            if (self._folder / single).is_file():
                return dict.fromkeys(self._file(single), single)
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

    def _holder(self, name: str) -> Mapping[str, Tensor]:
        """The file that holds the tensor `name`."""
        file = self._file(self._files[name])
        if name not in file:
            raise CheckpointError(f"{self._folder / self._files[name]}: lacks {name}, which the index names")
        return file

    def _file(self, name: str) -> Mapping[str, Tensor]:
        if name not in self._opened:
            path = self._folder / name
            if path.suffix == ".safetensors":
                self._opened[name] = SafetensorsFile(path)
            else:
                self._opened.clear()  # unmaps the one before
                self._opened[name] = _load_bin(path)
        return self._opened[name]


def _load_bin(path: Path) -> dict[str, Tensor]:
    """A `.bin` file: mapped, or read as a whole if it is of the older form, which cannot be mapped."""
    older = is_older(path)
    if older:
        logger.warning("%s: written by torch before 1.6; read as a whole, into memory", path)
    return load_tensors(path, str(path), mapped=not older)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object, or raise CheckpointError."""
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write as transformers does: two spaces, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(
    folder: Path,
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or several shards with an index if there is more than `max_shard_bytes`.

    Args:
        folder: where to.
        entries: all tensors, without values.
        tensors: the same with values, in the same order; taken one at a time.
        max_shard_bytes: no shard is larger, unless by a single tensor.

    Raises:
        CheckpointError: `tensors` are not `entries`.
        OSError: it cannot be written.
    """
    shards = _shards(entries, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    stream = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, stream)
    if surplus := next(stream, None):
        raise CheckpointError(f"{folder}: {surplus[0]} was not announced")
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries)
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file from tensors in memory, with the metadata that transformers and PEFT ask for."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # by the umask; safetensors makes files that only their owner can read
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise SaveError(f"{path.parent}: cannot be written ({error})") from error
    path.chmod(mode)


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def local_folder(name_or_path: str) -> Path:
    """A folder as it is; a hub id (`organisation/name`) is downloaded first, where there is a network.

    Of a model that has both, safetensors are downloaded, not `.bin` files.

    Raises:
        CheckpointError: neither a folder nor a model that can be downloaded.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path) or name_or_path.startswith("."):
        raise CheckpointError(f"{name_or_path}: no such folder, and not a hub id of the form organisation/name")
    folder = _download(name_or_path, HUB_FILES)
    return folder if any(folder.glob("*.safetensors")) else _download(name_or_path, [*HUB_FILES, "*.bin"])


def _download(name: str, patterns: list[str]) -> Path:
    """The folder with a hub model's files that match; sub-folders but that of chat templates hold other formats."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[f"{TEMPLATES}/*"], ignore_patterns=[]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name}: no such folder, and no model of that name can be downloaded ({type(error).__name__}); download "
            "it elsewhere and give its folder"
        ) from error
