"""The adapters of a run: made new or read from files, attached to the model, written at the end."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from nemo_dpo.checkpoint import CheckpointError, archive, sharded
from nemo_dpo.checkpoint.fingerprint import tensors_hash
from nemo_dpo.checkpoint.folders import unfinished
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.config.peft import LoraTuningConfig, PeftConfig, stage_without_adapter
from nemo_dpo.convert.adapter_nemo import check_base, read_adapter, tuning_of, write_adapter
from nemo_dpo.lora.adapters import activate, attach, initial
from nemo_dpo.lora.file import AdapterFile
from nemo_dpo.lora.spec import POLICY, Dimensions, LoraSpec, layers_of, linears_of
from nemo_dpo.model.gpt import ResponseGPT
from nemo_dpo.parallel.collective import agree, on_rank_zero
from nemo_dpo.parallel.engine import Engine
from nemo_dpo.parallel.groups import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapted:
    """What is trained instead of the weights.

    Attributes:
        spec: shape of the trained adapter.
        base: hash of the weights below it.
        hashes: name → identity of each attached adapter, as it was at the start of the run.
    """

    spec: LoraSpec
    base: str
    hashes: Mapping[str, str]

    @property
    def facts(self) -> dict[str, Any]:
        """What a resume must find unchanged, as json has it."""
        return {
            **{f"the adapter's {key}": value for key, value in tuning_of(self.spec).items()},
            **{f"the start of adapter {name}": digest for name, digest in self.hashes.items()},
        }


def adapt(
    chunks: Sequence[ResponseGPT], peft: PeftConfig, dimensions: Dimensions, base: str, seed: int, layout: Layout
) -> tuple[Adapted, list[tuple[nn.Parameter, Tensor]]]:
    """Freeze the weights of `chunks` and attach the run's adapters. Collective.

    Args:
        base: hash of the weights.
        seed: of a new adapter's start.

    Returns:
        The adapter, and this rank's parameters of it with their values in fp32.

    Raises:
        CheckpointError: an adapter file is damaged, or of another base, rank or choice of layers.
    """
    starts = agree(partial(_starts, peft, dimensions, base, seed))
    for name in peft.frozen_adapters:
        attach(chunks, name, starts[name].spec, dimensions, starts[name].tensors.__getitem__)
    for chunk in chunks:
        chunk.freeze_base()
    spec = starts[POLICY].spec
    agree(partial(_check_stages, spec, dimensions, layout))
    filled = attach(
        chunks,
        POLICY,
        spec,
        dimensions,
        starts[POLICY].tensors.__getitem__,
        dropout=peft.lora_tuning.adapter_dropout,
        dropout_position=peft.lora_tuning.dropout_position,
    )
    activate(chunks, POLICY)
    logger.info(
        "LoRA: rank %d, alpha %g, %s, %d adapted tensors here", spec.rank, spec.alpha, spec.linears, len(filled)
    )
    hashes = {name: start.identity for name, start in starts.items()}
    return Adapted(spec, base, hashes), [(parameter, tensor.float()) for parameter, tensor in filled]


@dataclass(frozen=True)
class _Start:
    """An adapter before it is shared out over the ranks.

    Attributes:
        identity: names its update: a hash of its tensors, and what they are multiplied by.
    """

    spec: LoraSpec
    tensors: Mapping[str, Tensor]
    identity: str


def _check_stages(spec: LoraSpec, dimensions: Dimensions, layout: Layout) -> None:
    """What the configuration cannot know of an adapter that is read from a file."""
    chunks = layout.pp * (layout.vpp or 1)
    layers = [number + 1 for number in spec.layers or range(dimensions.layers)]
    if problem := stage_without_adapter(layers, dimensions.layers, chunks):
        raise CheckpointError(f"model.peft.restore_from_path: {problem}")


def _start(spec: LoraSpec, tensors: Mapping[str, Tensor]) -> _Start:
    return _Start(spec, tensors, f"{tensors_hash(tensors)} × {spec.scale}")


def _starts(peft: PeftConfig, dimensions: Dimensions, base: str, seed: int) -> dict[str, _Start]:
    """Name → each adapter of the run. A file is read once, however many names it has."""
    paths = {name: Path(file) for name, file in peft.frozen_adapters.items()}
    if peft.restore_from_path is not None:
        paths[POLICY] = Path(peft.restore_from_path)
    files = {path: _read(path, dimensions, base) for path in dict.fromkeys(paths.values())}
    starts = {name: files[path] for name, path in paths.items()}
    if POLICY in starts:
        _check_tuning(paths[POLICY], starts[POLICY].spec, peft.lora_tuning, dimensions)
    else:
        starts[POLICY] = _new(peft.lora_tuning, dimensions, seed)
    return starts


def _read(path: Path, dimensions: Dimensions, base: str) -> _Start:
    file = read_adapter(path, dimensions)
    check_base(file, base, path)
    return _start(file.spec, file.tensors)


def _new(tuning: LoraTuningConfig, dimensions: Dimensions, seed: int) -> _Start:
    spec = LoraSpec(**_given(tuning.of_new, dimensions))
    tensor = initial(spec, dimensions, seed, tuning.column_init_method, tuning.row_init_method)
    return _start(spec, {name: tensor(name) for name in spec.shapes(dimensions)})


def _check_tuning(path: Path, held: LoraSpec, tuning: LoraTuningConfig, dimensions: Dimensions) -> None:
    """Refuse a configuration that contradicts the adapter in `path`."""
    asked = tuning_of(replace(held, **_given(tuning, dimensions)))
    for key, value in tuning_of(held).items():
        if asked[key] != value:
            raise CheckpointError(
                f"{path}: this adapter has {key}={_as_override(value)}, which "
                f"model.peft.lora_tuning.{key}={_as_override(asked[key])} contradicts; leave that out"
            )


def _as_override(value: Any) -> str:
    """As it stands in yaml, or on a command line."""
    return json.dumps(value).replace('"', "")


def _given(tuning: LoraTuningConfig, dimensions: Dimensions) -> dict[str, Any]:
    """The fields of LoraSpec that the configuration sets."""
    fields = {
        "linears": linears_of(tuning.target_modules) if tuning.target_modules else None,
        "rank": tuning.adapter_dim,
        "alpha": tuning.alpha,
        "variant": tuning.variant,
    }
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if tuning.layer_selection:
        given["layers"] = layers_of(tuning.layer_selection, dimensions.layers)
    return given


def export_adapter(path: Path, base: Path, engine: Engine, adapted: Adapted) -> Path:
    """Write the trained adapter as a `.nemo` of its own, with the config of its base. Collective."""
    folder = unfinished(path)
    sharded.save_weights(folder, engine)

    def write() -> None:
        tensors = {name.removeprefix("model."): tensor for name, tensor in read_weights(folder).items()}
        file = AdapterFile(adapted.spec, tensors, adapted.base)
        write_adapter(path, file, archive.read_model_config(base), overwrite=True)
        shutil.rmtree(folder)

    on_rank_zero(write)
    if dist.get_rank() == 0:
        logger.info("trained adapter: %s", path)
    return path
