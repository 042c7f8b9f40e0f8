"""Base + adapter → one `.nemo`: W + scale · B · A, tensor by tensor."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.fingerprint import pieces, weights_hash
from nemo_dpo.checkpoint.weights import Chunk, Weights, read_weights
from nemo_dpo.convert.adapter_nemo import NAMES, check_base, dimensions_of, read_adapter
from nemo_dpo.convert.compare import check_written
from nemo_dpo.convert.rules import interleave
from nemo_dpo.convert.run import DTYPES, dtype_of, temporary_folder, write_nemo
from nemo_dpo.lora.file import AdapterFile, Part, parts
from nemo_dpo.lora.spec import Dimensions, Linear, LoraSpec

logger = logging.getLogger(__name__)


def merge_adapter(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    precision: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> None:
    """Write the model `base` with the adapter `adapter` merged into its weights as the archive `output`.

    Args:
        base: a `.nemo`, archive or extracted folder, of any layout.
        adapter: an adapter `.nemo`.
        output: the archive; appears only when it is complete.
        precision: `32`, `bf16` or `16` for all weights; None keeps the base's. The sum itself is made in fp32.
        overwrite: replace an existing `output`.
        verify: read the archive again, compute every parameter once more and compare it before it gets its name.

    Raises:
        CheckpointError: anything missing or damaged, or an adapter of another base.
    """
    archive.check_target(output, overwrite=overwrite)
    dtype = dtype_of(precision)
    config = archive.read_model_config(base)
    dimensions = dimensions_of(config)
    file = read_adapter(adapter, dimensions)
    with temporary_folder(output) as target, archive.open_folder(base, scratch=target.parent) as folder:
        if file.base is None:
            logger.warning("%s does not say which base it was trained on; taken to be %s", adapter, base)
        else:
            check_base(file, weights_hash(folder / archive.MODEL_WEIGHTS), adapter)
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns(archive.MODEL_WEIGHTS), dirs_exist_ok=True)
        weights = read_weights(folder / archive.MODEL_WEIGHTS)
        _check_fits(weights, file.spec, dimensions, base)
        if dtype is not None:
            config["precision"] = next(name for name, known in DTYPES.items() if known == dtype)
        archive.write_model_config(config, target)

        def check(written: Path) -> None:
            check_written(written, _merged(weights, file, dimensions, dtype, "compare"), base)

        merged = _merged(weights, file, dimensions, dtype, "merge")
        write_nemo(target, merged, output, overwrite=overwrite, check=check if verify else None)
    logger.info("wrote %s", output)


def _merged(
    weights: Weights, file: AdapterFile, dimensions: Dimensions, dtype: torch.dtype | None, title: str
) -> Iterator[Chunk]:
    """The base's weights with the updates added, one layer of one parameter at a time."""
    linears = dimensions.linears()
    adapted = {key: list(group) for key, group in itertools.groupby(parts(file.spec, dimensions), key=_place)}
    for name, layer in tqdm(pieces(weights), desc=title, unit="tensor", disable=None, leave=False):
        tensor = weights[name] if layer is None else weights.layer(name, layer)
        kept = tensor.dtype
        if group := adapted.get((name, layer)):
            tensor = tensor + _update(file, group, linears[group[0].linear])
        num_layers = 0 if layer is None else weights.shape(name)[0]
        yield Chunk(name, tensor.to(dtype or kept), layer, num_layers)
        del tensor  # or it would live on while the next one is read


def _place(part: Part) -> tuple[str, int | None]:
    """Where the part's rows are: the stored weight and the layer."""
    return _weight(part.linear), part.layer


def _weight(linear: str) -> str:
    return f"model.decoder.layers.{NAMES[linear][0]}.{linear}.weight"


def _update(file: AdapterFile, group: Sequence[Part], linear: Linear) -> Tensor:
    """scale · B · A of a linear layer's parts, [outputs, inputs] in fp32, rows as the weight has them."""
    rows = [file.spec.scale * (file.tensors[part.b].float() @ file.tensors[part.a].float()) for part in group]
    return interleave(rows, linear.groups)


def _check_fits(weights: Weights, spec: LoraSpec, dimensions: Dimensions, base: Path) -> None:
    """Refuse weights that are not what their model_config.yaml says, where the adapter acts."""
    linears = dimensions.linears()
    for name in spec.linears:
        stored, expected = _weight(name), [dimensions.layers, sum(linears[name].parts.values()), linears[name].inputs]
        found = list(weights.shape(stored)) if stored in weights else None
        if found != expected:
            raise CheckpointError(f"{base}: {stored} has shape {found}, model_config.yaml implies {expected}")
