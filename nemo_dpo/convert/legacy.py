"""Read the weights of older `.nemo` archives: one `model_weights.ckpt`, or one for every model-parallel rank.

The rank of a tensor-parallel group is in the name of its folder, `mp_rank_XX`, with pipeline parallelism that of both,
`tp_rank_XX_pp_rank_XXX`. Joined they read as one dictionary, with the names of a single rank's file. A stage of the
pipeline counts its layers from 0; here they count through all stages. Files are mapped, tensors read when asked for.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.stored import plain_names
from nemo_dpo.checkpoint.torch_file import load_tensors
from nemo_dpo.convert.rules import interleave

WEIGHTS_FILE = "model_weights.ckpt"
LAYER = "{layer}"
_RANK = re.compile(r"mp_rank_(?P<mp>\d{2,})|tp_rank_(?P<tp>\d{2,})_pp_rank_(?P<pp>\d{3,})")
_LAYER_NUMBER = re.compile(r"(?<=\blayers\.)(\d+)(?=\.)")


class Join(enum.Enum):
    """How the tensor-parallel ranks share a parameter."""

    SAME = "every rank has all of it"
    ROWS = "each has rows"
    COLUMNS = "each has columns"
    HALVES = "each has rows of the first half, then the same rows of the second"


class LegacyWeights(Mapping[str, Tensor]):
    """The weights in the extracted archive `folder` as one rank would have them, by name."""

    def __init__(self, folder: Path, joins: Mapping[str, Join]) -> None:
        """Map all files.

        Args:
            folder: the extracted archive.
            joins: by name with LAYER in place of the layer's number; SAME where it is missing.

        Raises:
            CheckpointError: a rank's file is missing or damaged, ranks that do not have the same parameters.
        """
        self._folder, self._joins = folder, joins
        self._places: dict[str, list[tuple[str, list[dict[str, Tensor]]]]] = {}
        files_of_stages = rank_files(folder)
        self.stages, self.ranks, self.num_layers = len(files_of_stages), len(files_of_stages[0]), 0
        for files in files_of_stages:
            ranks = [_read_rank(file, folder) for file in files]
            if any(rank.keys() != ranks[0].keys() for rank in ranks):
                raise CheckpointError(f"{folder}: the ranks of one stage hold different parameters; copy it again")
            self._add_stage(ranks)

    def _add_stage(self, ranks: list[dict[str, Tensor]]) -> None:
        numbers = {int(match[1]) for name in ranks[0] if (match := _LAYER_NUMBER.search(name))}
        if numbers != set(range(len(numbers))):
            raise CheckpointError(f"{self._folder}: a stage holds the layers {sorted(numbers)[:8]} …, not 0 and up")
        for name in ranks[0]:
            full = _LAYER_NUMBER.sub(lambda match: str(int(match[1]) + self.num_layers), name)
            self._places.setdefault(full, []).append((name, ranks))
        self.num_layers += len(numbers)

    def __getitem__(self, name: str) -> Tensor:
        join = self._joins.get(_LAYER_NUMBER.sub(LAYER, name), Join.SAME)
        stages = [self._joined(name, join, [rank[local] for rank in ranks]) for local, ranks in self._places[name]]
        if any(not torch.equal(stage, stages[0]) for stage in stages[1:]):
            raise CheckpointError(f"{self._folder}: {name} differs between stages that should share it")
        return stages[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _joined(self, name: str, join: Join, parts: Sequence[Tensor]) -> Tensor:
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            raise CheckpointError(f"{self._folder}: {name} differs in shape or dtype between ranks")
        if len(parts) == 1:
            return parts[0]
        if parts[0].dim() < (2 if join is Join.COLUMNS else 1) or (join is Join.HALVES and parts[0].shape[0] % 2):
            raise CheckpointError(f"{self._folder}: {name} has shape {list(parts[0].shape)}, which cannot be joined")
        match join:
            case Join.ROWS:
                return torch.cat(tuple(parts))
            case Join.COLUMNS:
                return torch.cat(tuple(parts), dim=1)
            case Join.HALVES:
                return interleave(parts, 2)
        if any(not torch.equal(part, parts[0]) for part in parts[1:]):
            raise CheckpointError(
                f"{self._folder}: {name} differs between ranks that should all have it; copy it again"
            )
        return parts[0]


def rank_files(folder: Path) -> list[list[Path]]:
    """The weight files of the extracted archive `folder`: one list for a pipeline stage, in it one for a tensor rank.

    Raises:
        CheckpointError: none, two layouts at once, or a rank is missing.
    """
    entries = archive.legacy_entries(folder)
    if entries == [WEIGHTS_FILE]:
        return [[folder / WEIGHTS_FILE]]
    places: dict[tuple[int, int], Path] = {}
    for entry in entries:
        match = _RANK.fullmatch(entry)
        if match is None or not (folder / entry / WEIGHTS_FILE).is_file():
            raise CheckpointError(
                f"{folder}: {entry} is no folder of one rank with a {WEIGHTS_FILE}, beside {entries[:3]}"
            )
        places[int(match["pp"] or 0), int(match["tp"] or match["mp"] or 0)] = folder / entry / WEIGHTS_FILE
    stages, ranks = (1 + max(place[axis] for place in places) if places else 0 for axis in (0, 1))
    if not places or len(places) != len(entries) or len(places) != stages * ranks:
        raise CheckpointError(f"{folder}: holds {len(entries)} ranks of a layout of {ranks} × {stages}; copy it again")
    return [[places[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _read_rank(file: Path, folder: Path) -> dict[str, Tensor]:
    stored = load_tensors(file, f"{folder}: {file.relative_to(folder)}")
    names = plain_names(stored, f"{folder}: {file.relative_to(folder)}")
    return {plain: stored[name] for plain, name in names.items()}
