"""The adapters of a run: made new or read from files, attached to the model, written at the end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_dpo.checkpoint import CheckpointError, archive, sharded
from nemo_dpo.checkpoint.fingerprint import tensors_hash
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.config.peft import LoraTuningConfig, PeftConfig, stage_without_adapter
from nemo_dpo.convert.adapter_nemo import check_base, read_adapter, write_adapter
from nemo_dpo.lora.adapters import TensorOf, activate, attach, initial
from nemo_dpo.lora.file import AdapterFile
from nemo_dpo.lora.spec import POLICY, Dimensions, LoraSpec, linears_of
from nemo_dpo.model.gpt import ResponseGPT
from nemo_dpo.parallel.collective import agree, on_rank_zero
from nemo_dpo.parallel.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapted:
    """What is trained instead of the weights.

    Attributes:
        spec: shape of the trained adapter.
        base: hash of the weights below it.
        hashes: name → hash of each attached adapter, as it was at the start of the run.
    """

    spec: LoraSpec
    base: str
    hashes: Mapping[str, str]

    @property
    def facts(self) -> dict[str, Any]:
        """What a resume must find unchanged, as json has it."""
        spec = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.spec).items()}
        return {
            **{f"the adapter's {key}": value for key, value in spec.items()},
            **{f"the start of adapter {name}": digest for name, digest in self.hashes.items()},
        }


def adapt(
    chunks: Sequence[ResponseGPT], peft: PeftConfig, dimensions: Dimensions, base: str, seed: int
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
    hashes = {}
    for name, file in peft.frozen_adapters.items():
        frozen = agree(partial(_read, Path(file), dimensions, base))
        hashes[name] = tensors_hash(frozen.tensors)
        attach(chunks, name, frozen.spec, dimensions, frozen.tensors.__getitem__)
    for chunk in chunks:
        chunk.freeze_base()
    spec, tensor_of = agree(partial(_start, peft, dimensions, base, seed))
    agree(partial(_check_stages, spec, dimensions, chunks[0].config))
    hashes[POLICY] = tensors_hash({name: tensor_of(name) for name in spec.shapes(dimensions)})
    filled = attach(
        chunks,
        POLICY,
        spec,
        dimensions,
        tensor_of,
        dropout=peft.lora_tuning.adapter_dropout,
        dropout_position=peft.lora_tuning.dropout_position,
    )
    activate(chunks, POLICY)
    logger.info(
        "LoRA: rank %d, alpha %g, %s, %d adapted tensors here", spec.rank, spec.alpha, spec.linears, len(filled)
    )
    return Adapted(spec, base, hashes), [(parameter, tensor.float()) for parameter, tensor in filled]


def _start(peft: PeftConfig, dimensions: Dimensions, base: str, seed: int) -> tuple[LoraSpec, TensorOf]:
    """Shape and whole tensors of the adapter that training starts from."""
    tuning = peft.lora_tuning
    if peft.restore_from_path is None:
        spec = LoraSpec(**_given(tuning.of_new))
        return spec, initial(spec, dimensions, seed, tuning.column_init_method, tuning.row_init_method)
    path = Path(peft.restore_from_path)
    file = _read(path, dimensions, base)
    wanted = _given(tuning)
    for key, value in wanted.items():
        held = getattr(file.spec, key)
        if value != held:
            raise CheckpointError(
                f"{path}: this adapter has {key} {held}, model.peft.lora_tuning asks for {value}; leave it out"
            )
    return file.spec, file.tensors.__getitem__


def _check_stages(spec: LoraSpec, dimensions: Dimensions, config: TransformerConfig) -> None:
    """What the configuration cannot know of an adapter that is read from a file."""
    chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    layers = [number + 1 for number in spec.layers or range(dimensions.layers)]
    if problem := stage_without_adapter(layers, dimensions.layers, chunks):
        raise CheckpointError(f"model.peft.restore_from_path: {problem}")


def _read(path: Path, dimensions: Dimensions, base: str) -> AdapterFile:
    file = read_adapter(path, dimensions)
    check_base(file, base, path)
    return file


def _given(tuning: LoraTuningConfig) -> dict[str, Any]:
    """The fields of LoraSpec that the configuration sets."""
    fields = {
        "linears": linears_of(tuning.target_modules) if tuning.target_modules else None,
        "rank": tuning.adapter_dim,
        "alpha": tuning.alpha,
        "variant": tuning.variant,
        "layers": tuple(sorted(n - 1 for n in tuning.layer_selection)) if tuning.layer_selection else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def export_adapter(path: Path, base: Path, engine: Engine, adapted: Adapted) -> Path:
    """Write the trained adapter as a `.nemo` of its own, with the config of its base. Collective."""
    folder = path.with_name(path.name + sharded.UNFINISHED)
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
