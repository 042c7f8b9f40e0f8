"""Adapters in Hugging Face PEFT's form: adapter_config.json and adapter_model.safetensors.

PEFT has an A and a B for each projection of the Hugging Face model. Where q, k, v, gate and up are projections of their
own, that is our variant `canonical`; where q, k and v are one (GPT-2's `c_attn`, GPT-NeoX's `query_key_value`), it is
the variant `nemo`, in which they share an A. A projection that a PEFT adapter leaves out has A = B = 0 here: then it
gets no gradient and stays as it is in training, and NeMo's tools, which ask for all parts, can read the archive. An
export leaves out what is zero throughout.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.fingerprint import weights_hash
from nemo_dpo.convert.adapter_nemo import check_tensors, dimensions_of, read_adapter, write_adapter
from nemo_dpo.convert.families import family_of_nemo
from nemo_dpo.convert.family import dims_of
from nemo_dpo.convert.hf import HfWeights, read_json, save_safetensors, write_json
from nemo_dpo.convert.rules import Rule, interleave, separate
from nemo_dpo.convert.run import ADAPTER_CONFIG as CONFIG_FILE
from nemo_dpo.convert.run import check_folder_target, move_into_place, temporary_folder
from nemo_dpo.lora.file import AdapterFile, Part, parts
from nemo_dpo.lora.spec import LoraSpec
from nemo_dpo.model.nemo_keys import completed

WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Keys of adapter_config.json that are read, or that do not change what a finished adapter computes.
_READ = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "fan_in_fan_out",
}  # fmt: skip
_HARMLESS = {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
    "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "qalora_group_size",
    "runtime_config",
}  # fmt: skip
# Other keys must be off; these have more than one way to be.
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "layers_pattern": (None, "layers", ["layers"], []),
}
_REASONS = {
    "bias": "an adapter has no biases here",
    "init_lora_weights": "this start changes the base weights; save the adapter as PEFT converts it to plain LoRA",
    "use_dora": "DoRA scales whole columns of the weight, which is no low-rank update",
    "rank_pattern": "one rank holds for all layers",
    "alpha_pattern": "one alpha holds for all layers",
    "modules_to_save": "whole trained modules are no low-rank update; merge the adapter with PEFT instead",
    "trainable_token_indices": "trained embeddings are no low-rank update; merge the adapter with PEFT instead",
}


def peft_to_nemo(source: Path, base: Path, output: Path, *, overwrite: bool = False) -> None:
    """Convert the PEFT folder `source`, an adapter of the model `base` (`.nemo`), to the adapter `.nemo` `output`.

    Raises:
        CheckpointError: anything missing, damaged, unsupported, or not for this base.
    """
    archive.check_target(output, overwrite=overwrite)
    config = archive.read_model_config(base)
    file = import_peft(source, config)
    with temporary_folder(output) as scratch, archive.open_folder(base, scratch=scratch) as folder:
        file = replace(file, base=weights_hash(folder / archive.MODEL_WEIGHTS))
    write_adapter(output, file, config, overwrite=overwrite)


def nemo_to_peft(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Convert the adapter `.nemo` `source` to the PEFT folder `output`, which appears only when it is complete."""
    check_folder_target(output, overwrite=overwrite)
    config = archive.read_model_config(source)
    peft, tensors = export_peft(read_adapter(source, dimensions_of(config)), config)
    with temporary_folder(output) as folder:
        write_json(folder / CONFIG_FILE, peft)
        save_safetensors(tensors, folder / WEIGHTS_FILES[0])
        move_into_place(folder, output)


def import_peft(folder: Path, config: dict[str, Any]) -> AdapterFile:
    """Read a PEFT folder.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).
        config: model_config.yaml of the base.

    Raises:
        CheckpointError: anything missing, damaged, unsupported, or not for this base.
    """
    names = Names(config)
    peft = read_json(folder / CONFIG_FILE)
    spec, adapted = _described(peft, names, folder / CONFIG_FILE)
    shapes = spec.shapes(names.dimensions)
    stored = dict(HfWeights(folder, WEIGHTS_FILES))
    wanted = {}
    for one in adapted:
        wanted[one.tensor("A")] = shapes[one.parts[0].a]
        wanted[one.tensor("B")] = (sum(shapes[part.b][0] for part in one.parts), spec.rank)
    check_tensors(stored, wanted, folder)
    dtype = next(iter(stored.values())).dtype
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    for one in adapted:
        tensors[one.parts[0].a] = stored[one.tensor("A")]
        tensors |= zip((part.b for part in one.parts), names.split(one, stored[one.tensor("B")]), strict=True)
    file = AdapterFile(spec, tensors, peft=peft)
    silent = {one.kind for one in adapted} - {one.kind for one in _adapted(file, names)}
    if silent:
        known = sorted("".join(kind) for kind in silent)
        raise CheckpointError(f"{folder}: A and B of {known} are all zeros, as if left out; leave them out")
    return file


def export_peft(file: AdapterFile, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and PEFT's tensors of an adapter; `config` is model_config.yaml of the base.

    The variant `nemo` exports too: q, k and v get a copy each of the A that they share, and so do gate and up.

    Raises:
        CheckpointError: the adapter is zero, or has A's of their own where the base has one projection.
    """
    names = Names(config)
    check_exportable(file.spec, names)
    adapted = _adapted(file, names)
    if not adapted:
        raise CheckpointError("every value of the adapter is zero; there is nothing to export")
    tensors = {}
    for one in adapted:  # copies: safetensors refuses tensors that share memory
        tensors[one.tensor("A")] = file.tensors[one.parts[0].a].clone(memory_format=torch.contiguous_format)
        rows = names.join(one, [file.tensors[part.b] for part in one.parts])
        tensors[one.tensor("B")] = rows.clone(memory_format=torch.contiguous_format)
    if file.peft and _described(file.peft, names, Path(CONFIG_FILE)) == (file.spec, adapted):
        return dict(file.peft), tensors
    return _plain_config(file.spec, names, adapted), tensors


def check_exportable(spec: LoraSpec, names: Names) -> None:
    """Refuse an adapter with an A each for q, k and v where the base has one projection for them."""
    for one in names.projections(spec):
        if len({part.a for part in one.parts}) > 1:
            raise CheckpointError(
                f"{one.module} is one projection with one A in PEFT, the adapter has one for each of "
                f"{', '.join(one.kind)}; only model.peft.lora_tuning.variant=nemo can be exported"
            )


class Projection(NamedTuple):
    """A projection of the Hugging Face model: the linear layer's part that it is, or all parts in one."""

    module: str  # such as model.layers.0.self_attn.q_proj
    parts: tuple[Part, ...]

    @property
    def kind(self) -> tuple[str, ...]:
        """Names of the parts, alike in every layer."""
        return tuple(part.part for part in self.parts)

    def tensor(self, kind: str) -> str:
        """PEFT's name of its A or B."""
        return f"base_model.model.{self.module}.lora_{kind}.weight"


class Names:
    """The projections of one model, under Hugging Face's and PEFT's names, from its family's table."""

    def __init__(self, config: dict[str, Any]) -> None:
        """`config` is the model_config.yaml."""
        config = {**config, "vocab_size": 1}  # no adapter depends on the vocabulary
        self.dimensions = dims_of(config)
        rules = {
            rule.nemo.removesuffix(".weight").rpartition(".")[2]: rule
            for rule in family_of_nemo(config).table(completed(config)).rules
        }
        self._rules: dict[str, Rule] = {linear: rules[linear] for linear in self.dimensions.linears()}
        self._linears = self.dimensions.linears()

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers that can have adapters."""
        return tuple(self._linears)

    @property
    def transposed(self) -> bool:
        """Whether the projections are Conv1D, with weights [inputs, outputs]."""
        return all(rule.hf[0].transposed for rule in self._rules.values())

    @property
    def variant(self) -> str:
        """Which of ours has the same A's as PEFT."""
        whole = [len(rule.hf) < len(self._linears[linear].parts) for linear, rule in self._rules.items()]
        return "nemo" if any(whole) else "canonical"

    def projections(self, spec: LoraSpec) -> list[Projection]:
        """All that have adapters by `spec`."""
        found = []
        for (layer, linear), group in itertools.groupby(
            parts(spec, self.dimensions), key=lambda p: (p.layer, p.linear)
        ):
            served, params = tuple(group), self._rules[linear].hf
            each = [(part,) for part in served] if len(params) == len(served) else [served]
            for param, mine in zip(params, each, strict=True):
                found.append(Projection(param.name.removesuffix(".weight").format(layer=layer), mine))
        return found

    def join(self, one: Projection, rows: list[Tensor]) -> Tensor:
        """Rows of the parts → rows of the projection, in Hugging Face's order."""
        if len(rows) == 1:
            return rows[0]
        linear = one.parts[0].linear
        return self._rules[linear].unpack(interleave(rows, self._linears[linear].groups), self.dimensions)[0]

    def split(self, one: Projection, rows: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `join`."""
        if len(one.parts) == 1:
            return (rows,)
        name = one.parts[0].linear
        linear = self._linears[name]
        sizes = [linear.parts[part] for part in one.kind]
        return separate(self._rules[name].pack([rows], self.dimensions), sizes, linear.groups)


def _adapted(file: AdapterFile, names: Names) -> list[Projection]:
    """The projections whose like are not zero in all layers."""
    every = names.projections(file.spec)
    tensors = file.tensors
    alive = {one.kind for one in every if any(tensors[p.a].any() or tensors[p.b].any() for p in one.parts)}
    return [one for one in every if one.kind in alive]


def _described(peft: Mapping[str, Any], names: Names, source: Path) -> tuple[LoraSpec, list[Projection]]:
    """What an adapter_config.json asks for: the specification, where fused layers are whole, and the projections."""
    _check_supported(peft, names, source)
    rank, alpha = peft.get("r"), peft.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{source}: r={rank!r} and lora_alpha={alpha!r}; expected a whole number and a number")
    if peft.get("use_rslora"):  # scale lora_alpha / √r in place of lora_alpha / r
        alpha *= math.sqrt(rank)
    spec = LoraSpec(names.linears, rank, float(alpha), names.variant)
    wanted = _wanted(peft, names.projections(spec), source)
    places = [one.parts[0] for one in wanted]
    layers, kinds = sorted({part.layer for part in places}), {one.kind for one in wanted}
    if len(wanted) != len(layers) * len(kinds):
        raise CheckpointError(
            f"{source}: adapts other projections in some layers than in others; that is not supported"
        )
    linears = tuple(linear for linear in spec.linears if linear in {part.linear for part in places})
    selected = None if len(layers) == names.dimensions.layers else tuple(layers)
    return replace(spec, linears=linears, layers=selected), wanted


def _wanted(peft: Mapping[str, Any], every: list[Projection], source: Path) -> list[Projection]:
    """The projections that the configuration selects, by PEFT's rules."""
    target, excluded, layers = peft.get("target_modules"), peft.get("exclude_modules"), peft.get("layers_to_transform")
    chosen = [layers] if isinstance(layers, int) else layers or None
    modules = [one.module for one in every]
    lost = [name for name in target if not _selects([name], modules)] if isinstance(target, list) else []
    wanted = [
        one
        for one in every
        if _selects(target, [one.module])
        and not _selects(excluded, [one.module])
        and (chosen is None or one.parts[0].layer in chosen)
    ]
    if lost or not wanted:
        known = sorted({module.rpartition(".")[2] for module in modules})
        raise CheckpointError(
            f"{source}: target_modules={target!r} names {lost or 'nothing'} of this base; adapters can be on {known}"
        )
    return wanted


def _selects(target: Any, modules: list[str]) -> bool:
    """Whether PEFT's `target` (a regular expression, or names or their endings) selects any of `modules`."""
    if target is None:
        return False
    if isinstance(target, str):
        return target == "all-linear" or any(_compiled(target).fullmatch(module) for module in modules)
    return any(f".{module}".endswith(f".{name}") for name in target for module in modules)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{CONFIG_FILE}: {pattern!r} is no regular expression ({error})") from error


def _check_supported(peft: Mapping[str, Any], names: Names, source: Path) -> None:
    if peft.get("peft_type") != "LORA":
        raise CheckpointError(f"{source}: peft_type={peft.get('peft_type')!r}; only LORA adapters can be converted")
    if peft.get("fan_in_fan_out") and not names.transposed:
        raise CheckpointError(
            f"{source}: fan_in_fan_out=True is not supported: the weights of this base are stored [outputs, inputs]"
        )
    for key, value in peft.items():
        off = _OFF.get(key, (None, False, {}, []))
        if key not in _READ | _HARMLESS and value not in off:
            reason = _REASONS.get(key, "it changes what the adapter computes")
            raise CheckpointError(f"{source}: {key}={value!r} is not supported: {reason}")


def _plain_config(spec: LoraSpec, names: Names, adapted: list[Projection]) -> dict[str, Any]:
    every = {one.module for one in names.projections(replace(spec, linears=names.linears))}
    wanted = {one.module for one in adapted}
    modules = {_shortest(module, every, wanted) for module in wanted}
    alpha = int(spec.alpha) if spec.alpha.is_integer() else spec.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "layers_to_transform": None if spec.layers is None else list(spec.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": names.transposed,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def _shortest(module: str, every: set[str], wanted: set[str]) -> str:
    """The ending of a module's name that selects no other module than `wanted`: GPT-2 has a c_proj in each block."""
    pieces = module.split(".")
    endings = (".".join(pieces[start:]) for start in range(len(pieces) - 1, -1, -1))
    return next(end for end in endings if all(one in wanted for one in every if _selects([end], [one])))
