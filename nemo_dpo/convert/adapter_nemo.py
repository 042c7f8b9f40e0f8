"""Adapter `.nemo` archives: NeMo's names and layout outside, those of `lora.spec` inside.

Such an archive holds `model_config.yaml`, the base's with a section `peft`, and `model_weights.ckpt`, one flat
dictionary of tensors for tensor- and pipeline-parallel size 1. NeMo calls A `linear_in` and B `linear_out`. Its adapter
of a fused layer has the rows of B in the order of that layer's weight: query groups interleaved, gate above up.

Names, the meaning of a missing alpha and layer numbers from 1 are those of NeMo 2.0's `peft_config.py`,
`parallel_adapters.py` and `merge.py`, by reading. Not tried: loading an archive with NeMo itself.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.torch_file import load_tensors
from nemo_dpo.convert.family import ONE_RANK
from nemo_dpo.convert.rules import interleave, separate
from nemo_dpo.convert.run import temporary_folder
from nemo_dpo.lora.file import AdapterFile, parts
from nemo_dpo.lora.spec import TARGETS, VARIANTS, Dimensions, Linear, LoraSpec, layers_of, linears_of
from nemo_dpo.model.architecture import Architecture, ArchitectureError

WEIGHTS_FILE = "model_weights.ckpt"
OWN_SECTION = "nemo_dpo"  # of model_config.yaml: what NeMo has no place for
# linear layer → its block, NeMo's adapter of the whole layer, and what encloses NeMo's adapters of its parts
NAMES = {
    "linear_qkv": ("self_attention", "lora_kqv_adapter", "lora_unfused_kqv_adapter"),
    "linear_proj": ("self_attention", "lora_dense_attention_adapter", ""),
    "linear_fc1": ("mlp", "lora_hto4h_adapter", "lora_unfused_hto4h_adapter"),
    "linear_fc2": ("mlp", "lora_4htoh_adapter", ""),
}
# What NeMo asks of the section without a default, and what a finished adapter no longer depends on.
UNUSED = {"adapter_dropout": 0.0, "weight_tying": False, "position_embedding_strategy": None}


def dimensions_of(config: Mapping[str, Any]) -> Dimensions:
    """Sizes of the model that a model_config.yaml describes."""
    try:
        return Architecture.parse(config, tokenizer_vocab_size=1).dimensions  # no adapter depends on the vocabulary
    except ArchitectureError as error:
        raise CheckpointError(str(error)) from error


def read_adapter(path: Path, dimensions: Dimensions) -> AdapterFile:
    """Read an adapter `.nemo`, an archive or an extracted folder, written by this package or by NeMo.

    Args:
        path: the adapter.
        dimensions: of the base that it is for.

    Raises:
        CheckpointError: no adapter, damaged, split over ranks, or not for a base of these dimensions.
    """
    config = archive.read_model_config(path)
    spec = _spec_of(config, dimensions, path)
    own = _mapping(config.get(OWN_SECTION))
    with archive.open_folder(path, check=_check_complete) as folder:
        # Read whole: what lies in a temporary folder cannot stay mapped.
        stored = load_tensors(io.BytesIO((folder / WEIGHTS_FILE).read_bytes()), f"{path}: {WEIGHTS_FILE}")
    check_tensors(stored, _shapes(spec, dimensions), path)
    tensors = {name: tensor for pair in _pairs(spec, dimensions) for name, tensor in pair.unpack(stored)}
    return AdapterFile(spec, tensors, own.get("base_weights"), own.get("peft_config"))


def write_adapter(path: Path, file: AdapterFile, config: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write an adapter `.nemo`; it appears only when it is complete.

    Args:
        path: the archive.
        file: the adapter; its tensors may be on any device.
        config: model_config.yaml of the base.
        overwrite: replace an existing `path`.

    Raises:
        CheckpointError: `path` exists, or the tensors are not those of the specification.
        SaveError: it cannot be written.
    """
    archive.check_target(path, overwrite=overwrite)
    dimensions = dimensions_of(config)
    check_tensors(file.tensors, file.spec.shapes(dimensions), path)
    own = {"base_weights": file.base, "peft_config": dict(file.peft) if file.peft else None}
    written = {**config, **ONE_RANK, "peft": _section(file.spec), OWN_SECTION: own}
    with temporary_folder(path) as folder:
        data = io.BytesIO()
        torch.save({n: t for pair in _pairs(file.spec, dimensions) for n, t in pair.pack(file.tensors)}, data)
        (folder / WEIGHTS_FILE).write_bytes(data.getbuffer())
        archive.write_model_config(written, folder)
        archive.write_archive(folder, path, overwrite=overwrite, check=_check_complete)


def check_base(file: AdapterFile, base: str, path: Path) -> None:
    """Refuse an adapter that names other base weights than those with the hash `base`; one that names none may pass."""
    if file.base not in (None, base):
        raise CheckpointError(
            f"{path}: was trained on base weights {str(file.base)[:12]}…, these are {base[:12]}…; give the base .nemo "
            "that it was trained on, in the same precision"
        )


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse names or shapes that are not exactly `shapes`, and what are no floating-point numbers."""
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}; its "
            "configuration, or the base, belongs to another adapter"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, expected floating "
                f"point {list(shape)}; its rank or its base is another than its configuration says"
            )


@dataclass(frozen=True)
class _Pair:
    """One linear_in and linear_out of NeMo's.

    Attributes:
        name: of NeMo's adapter.
        a: name of our A.
        b: names of our B's, in the order of the linear layer.
        rows: rows of each.
        linear: the linear layer.
    """

    name: str
    a: str
    b: tuple[str, ...]
    rows: tuple[int, ...]
    linear: Linear

    @property
    def linear_in(self) -> str:
        return f"{self.name}.linear_in.weight"

    @property
    def linear_out(self) -> str:
        return f"{self.name}.linear_out.weight"

    def pack(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Our tensors → NeMo's, as copies: torch.save writes the whole storage behind a view."""
        yield self.linear_in, _copy(tensors[self.a])
        yield self.linear_out, _copy(interleave([tensors[name] for name in self.b], self.linear.groups))

    def unpack(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """NeMo's tensors → ours."""
        yield self.a, stored[self.linear_in]
        yield from zip(self.b, separate(stored[self.linear_out], self.rows, self.linear.groups), strict=True)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _pairs(spec: LoraSpec, dimensions: Dimensions) -> Iterator[_Pair]:
    linears = dimensions.linears()
    for a, group in itertools.groupby(parts(spec, dimensions), key=lambda part: part.a):
        served = tuple(group)
        layer, name = served[0].layer, served[0].linear
        linear, (block, whole, single) = linears[name], NAMES[name]
        adapter = whole if len(served) == len(linear.parts) else f"{single}.{served[0].part}_adapter"
        yield _Pair(
            name=f"model.decoder.layers.{layer}.{block}.adapter_layer.{adapter}",
            a=a,
            b=tuple(part.b for part in served),
            rows=tuple(linear.parts[part.part] for part in served),
            linear=linear,
        )


def _shapes(spec: LoraSpec, dimensions: Dimensions) -> dict[str, tuple[int, ...]]:
    """Name → shape of NeMo's tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for pair in _pairs(spec, dimensions):
        found[pair.linear_in] = (spec.rank, pair.linear.inputs)
        found[pair.linear_out] = (sum(pair.rows), spec.rank)
    return found


def tuning_of(spec: LoraSpec) -> dict[str, Any]:
    """`LoraSpec` → keys of `peft.lora_tuning`, as a user sets them."""
    target = {linears[0]: name for name, linears in TARGETS.items() if len(linears) == 1}
    return {
        "target_modules": [target[linear] for linear in spec.linears],
        "adapter_dim": spec.rank,
        "alpha": spec.alpha,
        "variant": spec.variant,
        "layer_selection": None if spec.layers is None else [layer + 1 for layer in spec.layers],
    }


def _section(spec: LoraSpec) -> dict[str, Any]:
    """`LoraSpec` → the section `peft` of model_config.yaml."""
    return {"peft_scheme": "lora", "lora_tuning": {**tuning_of(spec), **UNUSED}}


def _spec_of(config: Mapping[str, Any], dimensions: Dimensions, path: Path) -> LoraSpec:
    """The section `peft` of model_config.yaml → `LoraSpec`."""
    section = _mapping(config.get("peft"))
    if section.get("peft_scheme") != "lora":
        raise CheckpointError(
            f"{path}: is no LoRA adapter (its model_config.yaml has peft.peft_scheme={section.get('peft_scheme')!r}); "
            "give the adapter's .nemo, not its base"
        )
    tuning = _mapping(section.get("lora_tuning"))
    rank: Any = tuning.get("adapter_dim")
    alpha: Any = rank if tuning.get("alpha") is None else tuning["alpha"]
    targets, layers = tuning.get("target_modules", ["attention_qkv"]), tuning.get("layer_selection")
    variant = tuning.get("variant", "nemo")
    known = {target for target, linears in TARGETS.items() if dimensions.linears().keys() >= set(linears)}
    wrong = {
        "adapter_dim": not isinstance(rank, int) or rank < 1,
        "alpha": not isinstance(alpha, int | float),
        "target_modules": not _all_in(targets, known),
        "variant": variant not in VARIANTS,
        "layer_selection": layers is not None and not _all_in(layers, range(1, dimensions.layers + 1)),
        "weight_tying": bool(tuning.get("weight_tying")),
    }
    if any(wrong.values()):
        found = {key: tuning.get(key) for key, is_wrong in wrong.items() if is_wrong}
        raise CheckpointError(f"{path}: peft.lora_tuning has {found}, which cannot be read for this base")
    return LoraSpec(linears_of(targets), rank, float(alpha), variant, layers_of(layers, dimensions.layers))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _all_in(values: Any, known: Container[Any]) -> bool:
    """Whether `values` is a list, not empty, of nothing but what is known."""
    return (
        isinstance(values, list) and bool(values) and all(not isinstance(v, list | dict) and v in known for v in values)
    )


def _check_complete(folder: Path, source: Path) -> None:
    """As `archive.check_complete`, for an adapter."""
    if not (folder / archive.MODEL_CONFIG).is_file():
        raise CheckpointError(f"{source}: holds no {archive.MODEL_CONFIG}; it is not a complete .nemo archive")
    if (folder / WEIGHTS_FILE).is_file():
        return
    if (folder / archive.MODEL_WEIGHTS).is_dir():
        raise CheckpointError(f"{source}: holds a whole model, not an adapter; it needs no base")
    if any(entry.name.startswith(("mp_rank_", "tp_rank_")) for entry in folder.iterdir()):
        raise CheckpointError(f"{source}: is split over ranks; join it with NeMo's lora_converters/to_tp1.py first")
    raise CheckpointError(f"{source}: holds no {WEIGHTS_FILE}; it is not a complete adapter archive")
