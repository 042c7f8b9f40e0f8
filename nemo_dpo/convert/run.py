"""The conversions, put together: config, weights, tokenizer, and one rename at the end that shows the whole result."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_dpo.checkpoint import CheckpointError, SaveError, archive
from nemo_dpo.checkpoint.weights import read_weights, write_weights
from nemo_dpo.convert import engine
from nemo_dpo.convert.families import family_of_hf, family_of_nemo
from nemo_dpo.convert.family import dims_of, to_hf_config, to_model_config
from nemo_dpo.convert.hf import HfWeights, read_json, write_json, write_safetensors
from nemo_dpo.model.architecture import Architecture, stated_vocab_size
from nemo_dpo.tokenizer import ARTEFACT, copy_hf_files, load_tokenizer, resolve_artefact

logger = logging.getLogger(__name__)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
NEMO_VERSION = "2.0.0"
BATCHES_AND_LAYOUT: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "sequence_parallel": False,
}


def dtype_of(precision: str | None) -> torch.dtype | None:
    """NeMo's names of precisions (`32`, `bf16`, `16`, also `32-true`, `bf16-mixed`, …) → dtype; None → None."""
    if precision is None:
        return None
    name = precision.removesuffix("-true").removesuffix("-mixed").removeprefix("fp")
    if name not in DTYPES:
        raise CheckpointError(f"precision={precision!r} is not known; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def hf_to_nemo(
    source: Path, output: Path, *, precision: str | None, hparams_file: Path | None, overwrite: bool
) -> None:
    """Convert the Hugging Face folder `source` to the `.nemo` archive `output`.

    Args:
        source: folder with config.json, weights (safetensors or .bin, sharded or not) and tokenizer files.
        output: the archive; appears only when it is complete.
        precision: `32`, `bf16` or `16` to convert the weights; None keeps their dtype.
        hparams_file: a YAML file (its section `model`, if it has one) with keys for model_config.yaml that the
            architecture does not determine.
        overwrite: replace an existing `output`.

    Raises:
        CheckpointError, TokenizerError: anything missing, damaged, unsupported or unmatched.
    """
    archive.check_target(output, overwrite=overwrite)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    hf_config = read_json(source / CONFIG)
    config = to_model_config(family_of_hf(hf_config), hf_config, {**BATCHES_AND_LAYOUT, **_template(hparams_file)})
    with temporary_folder(output) as folder:
        _pack_weights(source, config, folder, dtype_of(precision))
        tokenizer = archive.artefact_name("tokenizer")
        copy_hf_files(source, folder / tokenizer)
        config |= {"tokenizer": _tokenizer_section(tokenizer), "huggingface": {"config": hf_config}}
        if (source / GENERATION_CONFIG).is_file():
            config["huggingface"]["generation_config"] = read_json(source / GENERATION_CONFIG)
        config |= {"target": TARGET, "nemo_version": NEMO_VERSION}
        archive.write_model_config(config, folder)
        archive.write_archive(folder, output, overwrite=overwrite)
    logger.info("wrote %s", output)


def _pack_weights(source: Path, config: dict[str, Any], folder: Path, dtype: torch.dtype | None) -> None:
    """Write the weights and note their precision in `config`."""
    table, dims = family_of_hf(read_json(source / CONFIG)).table(config), dims_of(config)
    with HfWeights(source) as weights:
        write_weights(folder / archive.MODEL_WEIGHTS, engine.to_chunks(table, dims, weights, dtype))
    stored = read_weights(folder / archive.MODEL_WEIGHTS).dtype(engine.PREFIX + table.rules[0].nemo)
    names = {value: name for name, value in DTYPES.items()}
    if stored not in names:
        raise CheckpointError(f"{source}: weights are {stored}; give a precision of {', '.join(DTYPES)}")
    config["precision"] = names[stored]


def _template(hparams_file: Path | None) -> dict[str, Any]:
    if hparams_file is None:
        return {}
    try:
        content = yaml.safe_load(hparams_file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{hparams_file}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{hparams_file}: expected a mapping of keys")
    section = content.get("model", content)
    return dict(section)


def _tokenizer_section(artefact: str) -> dict[str, Any]:
    return {
        "library": "huggingface",
        "type": f"{ARTEFACT}{artefact}",
        "use_fast": True,
        "model": None,
        "vocab_file": None,
        "merge_file": None,
        "delimiter": None,
        "sentencepiece_legacy": False,
    }


def nemo_to_hf(source: Path, output: Path, *, precision: str | None, overwrite: bool) -> None:
    """Convert `source`, a `.nemo` archive or extracted folder, to the Hugging Face folder `output`.

    Args:
        source: as written by `hf_to_nemo`, by a training run at any layout, or by NeMo (torch_dist weights).
        output: the folder; appears only when it is complete.
        precision: `32`, `bf16` or `16` to convert the weights; None keeps their dtype.
        overwrite: replace an existing `output`.

    Raises:
        ArchitectureError, CheckpointError, TokenizerError: anything missing, damaged, unsupported or unmatched.
    """
    archive.check_target(output, overwrite=overwrite)
    dtype = dtype_of(precision)
    with temporary_folder(output) as target, archive.open_folder(source, scratch=target.parent) as folder:
        config = archive.read_model_config(folder)
        section = config.get("tokenizer") or {}
        config["vocab_size"] = stated_vocab_size(config) or load_tokenizer(section, folder).vocab_size
        Architecture.parse(config)  # refuses what has no counterpart in config.json
        stored = _unpack_weights(folder, config, target, dtype)
        hf_config = to_hf_config(family_of_nemo(config), config)
        name = "dtype" if "dtype" in hf_config else "torch_dtype"  # transformers 5 and 4
        if name in hf_config or dtype is not None:
            hf_config[name] = str(stored).removeprefix("torch.")
        write_json(target / CONFIG, hf_config)
        if generation := (config.get("huggingface") or {}).get("generation_config"):
            write_json(target / GENERATION_CONFIG, generation)
        _export_tokenizer(section, folder, target)
        move_into_place(target, output)
    logger.info("wrote %s", output)


def _unpack_weights(folder: Path, config: dict[str, Any], target: Path, dtype: torch.dtype | None) -> torch.dtype:
    """Write the safetensors files; returns the dtype of what is in them."""
    table = family_of_nemo(config).table(config)
    weights = read_weights(folder / archive.MODEL_WEIGHTS)
    write_safetensors(target, engine.to_hf(table, dims_of(config), weights, dtype))
    return dtype or weights.dtype(engine.PREFIX + table.rules[0].nemo)


def _export_tokenizer(section: dict[str, Any], folder: Path, target: Path) -> None:
    """Put the tokenizer's files into the Hugging Face folder."""
    library = section.get("library")
    if library == "sentencepiece":
        shutil.copyfile(resolve_artefact(str(section.get("model")), folder), target / "tokenizer.model")
        return
    source = resolve_artefact(str(section.get("type")), folder)
    if library != "huggingface" or not Path(source).is_dir():
        raise CheckpointError(
            f"tokenizer {library!r} {source!r} is not in the checkpoint; name a folder with its files"
        )
    copy_hf_files(Path(source), target)


@contextlib.contextmanager
def temporary_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, on the same file system, gone afterwards; a full disk becomes a SaveError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as parent:
            folder = Path(parent) / "content"
            folder.mkdir()
            yield folder
    except OSError as error:
        raise SaveError(f"{output}: cannot be written ({error.strerror or error}); is the disk full?") from error


def move_into_place(folder: Path, output: Path) -> None:
    """Rename `folder` to `output`; what was there before goes only after the new one is complete."""
    if output.exists():
        old = folder.parent / "replaced"
        output.rename(old)
    folder.rename(output)
    archive.sync_folder(output.parent)
