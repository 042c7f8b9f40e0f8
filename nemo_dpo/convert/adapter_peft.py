"""Adapters in Hugging Face PEFT's form: adapter_config.json and adapter_model.safetensors.

PEFT has an A and a B for each of q, k, v, gate and up, which is our variant `canonical`. A projection that a PEFT
adapter leaves out has A = B = 0 here: then neither gets a gradient, so it stays as it is in training, and NeMo's tools,
which ask for all parts, can read the archive. An export leaves out what is zero throughout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.fingerprint import weights_hash
from nemo_dpo.convert.adapter_nemo import check_tensors, dimensions_of, read_adapter, write_adapter
from nemo_dpo.convert.families import family_of_nemo
from nemo_dpo.convert.hf import HfWeights, read_json, save_safetensors, write_json
from nemo_dpo.convert.run import move_into_place, temporary_folder
from nemo_dpo.lora.file import AdapterFile, Part, parts
from nemo_dpo.lora.spec import TARGETS, Dimensions, LoraSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Keys of adapter_config.json that are read, or that do not change what a finished adapter computes.
_READ = {"r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform"}
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
    "fan_in_fan_out": "the weights of this base are stored [outputs, inputs]",
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
    archive.check_target(output, overwrite=overwrite)
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
    dimensions, names = dimensions_of(config), Names(config)
    peft = read_json(folder / CONFIG_FILE)
    spec, adapted = _described(peft, names, dimensions, folder / CONFIG_FILE)
    shapes = spec.shapes(dimensions)
    with HfWeights(folder, WEIGHTS_FILES) as weights:
        stored = dict(weights)
    own = {names.tensor(part, kind): name for part in adapted for kind, name in (("A", part.a), ("B", part.b))}
    check_tensors(stored, {name: shapes[mine] for name, mine in own.items()}, folder)
    dtype = next(iter(stored.values())).dtype
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    tensors |= {mine: stored[name] for name, mine in own.items()}
    file = AdapterFile(spec, tensors, peft=peft)
    silent = {part.part for part in adapted} - {part.part for part in _adapted(file, dimensions)}
    if silent:
        raise CheckpointError(f"{folder}: A and B of {sorted(silent)} are all zeros, as if left out; leave them out")
    return file


def export_peft(file: AdapterFile, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and PEFT's tensors of an adapter; `config` is model_config.yaml of the base.

    The variant `nemo` exports too: q, k and v get a copy each of the A that they share, and so do gate and up.
    """
    dimensions, names = dimensions_of(config), Names(config)
    adapted = _adapted(file, dimensions)
    if not adapted:
        raise CheckpointError("every value of the adapter is zero; there is nothing to export")
    tensors = {}
    for part in adapted:  # copies: safetensors refuses tensors that share memory
        tensors[names.tensor(part, "A")] = file.tensors[part.a].clone(memory_format=torch.contiguous_format)
        tensors[names.tensor(part, "B")] = file.tensors[part.b].clone(memory_format=torch.contiguous_format)
    if file.peft and _described(file.peft, names, dimensions, Path(CONFIG_FILE)) == (file.spec, adapted):
        return dict(file.peft), tensors
    return _plain_config(file.spec, {names.module(part).rpartition(".")[2] for part in adapted}), tensors


class Names:
    """Hugging Face's and PEFT's names of the projections of one model, from its family's table."""

    def __init__(self, config: dict[str, Any]) -> None:
        """`config` is the model_config.yaml."""
        linears = dimensions_of(config).linears()
        rules = {
            rule.nemo.removesuffix(".weight").rpartition(".")[2]: rule
            for rule in family_of_nemo(config).table(config).rules
        }
        self._templates = {
            part: param.name.removesuffix(".weight")
            for linear in TARGETS["all"]
            for part, param in zip(linears[linear].parts, rules[linear].hf, strict=True)
        }

    def module(self, part: Part) -> str:
        """The projection, such as model.layers.0.self_attn.q_proj."""
        return self._templates[part.part].format(layer=part.layer)

    def tensor(self, part: Part, kind: str) -> str:
        """PEFT's name of its A or B."""
        return f"base_model.model.{self.module(part)}.lora_{kind}.weight"


def _adapted(file: AdapterFile, dimensions: Dimensions) -> list[Part]:
    """The parts that are not zero in all layers."""
    every = list(parts(file.spec, dimensions))
    alive = {part.part for part in every if file.tensors[part.a].any() or file.tensors[part.b].any()}
    return [part for part in every if part.part in alive]


def _described(
    peft: Mapping[str, Any], names: Names, dimensions: Dimensions, source: Path
) -> tuple[LoraSpec, list[Part]]:
    """What an adapter_config.json asks for: the specification, where fused layers are whole, and the adapted parts."""
    _check_supported(peft, source)
    rank, alpha = peft.get("r"), peft.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{source}: r={rank!r} and lora_alpha={alpha!r}; expected a whole number and a number")
    if peft.get("use_rslora"):  # scale lora_alpha / √r in place of lora_alpha / r
        alpha *= math.sqrt(rank)
    spec = LoraSpec(TARGETS["all"], rank, float(alpha), "canonical")
    wanted = _wanted(peft, names, list(parts(spec, dimensions)), source)
    layers, kinds = sorted({part.layer for part in wanted}), {part.part for part in wanted}
    if len(wanted) != len(layers) * len(kinds):
        raise CheckpointError(
            f"{source}: adapts other projections in some layers than in others; that is not supported"
        )
    linears = tuple(linear for linear in spec.linears if linear in {part.linear for part in wanted})
    selected = None if len(layers) == dimensions.layers else tuple(layers)
    return replace(spec, linears=linears, layers=selected), wanted


def _wanted(peft: Mapping[str, Any], names: Names, every: list[Part], source: Path) -> list[Part]:
    """The parts that the configuration selects, by PEFT's rules."""
    target, excluded, layers = peft.get("target_modules"), peft.get("exclude_modules"), peft.get("layers_to_transform")
    chosen = [layers] if isinstance(layers, int) else layers or None
    modules = [names.module(part) for part in every]
    lost = [name for name in target if not _selects([name], modules)] if isinstance(target, list) else []
    wanted = [
        part
        for part, module in zip(every, modules, strict=True)
        if _selects(target, [module]) and not _selects(excluded, [module]) and (chosen is None or part.layer in chosen)
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


def _check_supported(peft: Mapping[str, Any], source: Path) -> None:
    if peft.get("peft_type") != "LORA":
        raise CheckpointError(f"{source}: peft_type={peft.get('peft_type')!r}; only LORA adapters can be converted")
    for key, value in peft.items():
        off = _OFF.get(key, (None, False, {}, []))
        if key not in _READ | _HARMLESS and value not in off:
            reason = _REASONS.get(key, "it changes what the adapter computes")
            raise CheckpointError(f"{source}: {key}={value!r} is not supported: {reason}")


def _plain_config(spec: LoraSpec, modules: set[str]) -> dict[str, Any]:
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
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
