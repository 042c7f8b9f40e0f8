"""The conversions, put together: config, weights, tokenizer, and one rename at the end that shows the whole result."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_dpo.checkpoint import CheckpointError, archive, io_error
from nemo_dpo.checkpoint.weights import Chunk, stream_weights
from nemo_dpo.convert.compare import check_same
from nemo_dpo.convert.family import ONE_RANK, differences, to_model_config
from nemo_dpo.convert.hf import read_json, write_json, write_safetensors
from nemo_dpo.convert.opened import CONFIG, HfFolder, open_hf, open_nemo
from nemo_dpo.model.architecture import Architecture
from nemo_dpo.tokenizer import (
    ARTEFACT,
    HF_FILES,
    TEMPLATES,
    check_same_tokenizer,
    copy_hf_files,
    export_tokenizer,
    load_tokenizer,
)

logger = logging.getLogger(__name__)

GENERATION_CONFIG, ADAPTER_CONFIG = "generation_config.json", "adapter_config.json"
EXPORTED = (".json", ".safetensors", ".model", ".txt", ".jinja", ".md")  # what an export, and a model card, consist of
UNIMPORTANT = (".md", ".index.json", "LICENSE", "LICENSE.txt", "NOTICE")  # beside a model, and no part of it
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
NEMO_VERSION = "2.0.0"
BATCHES_AND_LAYOUT: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1,
    **ONE_RANK,
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
    source: Path,
    output: Path,
    *,
    precision: str | None,
    hparams_file: Path | None,
    overwrite: bool,
    families: Collection[str] = (),
    verify: bool = True,
) -> None:
    """Convert the Hugging Face folder `source` to the `.nemo` archive `output`.

    Args:
        source: folder with config.json, weights (safetensors or .bin, sharded or not) and tokenizer files.
        output: the archive; appears only when it is complete.
        precision: `32`, `bf16` or `16` to convert the weights; None keeps their dtype.
        hparams_file: a YAML file (its section `model`, if it has one) with keys for model_config.yaml that the
            architecture does not determine.
        overwrite: replace an existing `output`.
        families: the families that are meant, by `model_type`; any that is supported if empty.
        verify: read the archive again and compare every parameter with `source` before it gets its name.

    Raises:
        CheckpointError, TokenizerError: anything missing, damaged, unsupported, unmatched or not meant.
    """
    archive.check_target(output, overwrite=overwrite)
    dtype = dtype_of(precision)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    check_family(str(read_json(source / CONFIG).get("model_type")), families, f"{source / CONFIG}")
    opened = open_hf(source)
    config = to_model_config(opened.family, opened.hf_config(), {**BATCHES_AND_LAYOUT, **_template(hparams_file)})
    config["precision"] = _precision(opened, dtype)
    if hparams_file is not None:
        _check_template(opened, config, hparams_file)

    def check(written: Path) -> None:
        with open_nemo(written, scratch=output.parent) as nemo:
            check_same(opened, nemo, dtype)

    with temporary_folder(output) as folder:
        _write_small_files(opened, config, folder)
        write_nemo(folder, opened.chunks(dtype), output, overwrite=overwrite, check=check if verify else None)
    logger.info("wrote %s", output)


def write_nemo(
    folder: Path, chunks: Iterable[Chunk], output: Path, *, overwrite: bool, check: Callable[[Path], None] | None
) -> None:
    """Write the archive `output` of the small files in `folder` and the weights `chunks`, which lie on no disk before.

    Args:
        check: as of `archive.new_archive`.
    """
    with archive.new_archive(output, overwrite=overwrite, check=check) as tar:
        tar.add_tree(folder, first=archive.MODEL_CONFIG)
        stream_weights(lambda name: tar.create(f"{archive.MODEL_WEIGHTS}/{name}"), chunks)


def check_family(model_type: str, families: Collection[str], source: str) -> None:
    """Refuse a family that is not one of `families`, unless these are none."""
    if families and model_type not in families:
        raise CheckpointError(
            f"{source}: is of the family {model_type!r}, this is for {', '.join(families)}; convert_hf_to_nemo.py and "
            "convert_nemo_to_hf.py take every family that is supported"
        )


def _precision(source: HfFolder, dtype: torch.dtype | None) -> str:
    """NeMo's name of what the weights will be stored in."""
    stored = source.entries(dtype)[0].dtype
    names = {value: name for name, value in DTYPES.items()}
    if stored not in names:
        raise CheckpointError(f"{source.path}: weights are {stored}; give a precision of {', '.join(DTYPES)}")
    return names[stored]


def _write_small_files(source: HfFolder, config: dict[str, Any], folder: Path) -> None:
    """Tokenizer and model_config.yaml: all of the archive but the weights."""
    tokenizer = archive.artefact_name("tokenizer")
    section = _tokenizer_section(tokenizer)
    copy_hf_files(source.folder, folder / tokenizer)
    check_same_tokenizer(source.tokenizer(), load_tokenizer(section, folder), str(source.path))
    _warn_of_what_stays(source)
    config |= {"tokenizer": section, "huggingface": {"config": source.hf_config()}}
    if (source.folder / GENERATION_CONFIG).is_file():
        config["huggingface"]["generation_config"] = read_json(source.folder / GENERATION_CONFIG)
    config |= {"target": TARGET, "nemo_version": NEMO_VERSION}
    archive.write_model_config(config, folder)


def _warn_of_what_stays(source: HfFolder) -> None:
    """Name the files that an archive has no place for; a tokenizer with code of its own is among them."""
    taken = {CONFIG, GENERATION_CONFIG, TEMPLATES, *HF_FILES, *source.weights.files}
    stays = sorted(
        entry.name
        for entry in source.folder.iterdir()
        if entry.name not in taken and not entry.name.startswith(".") and not entry.name.endswith(UNIMPORTANT)
    )
    if stays:
        logger.warning("%s: not carried into the archive: %s", source.path, ", ".join(stays))


def _check_template(opened: HfFolder, config: dict[str, Any], hparams_file: Path) -> None:
    """Refuse keys of the file that make another model of it than config.json describes."""
    if other := differences(opened.family, {**config, "huggingface": {"config": opened.hf_config()}}):
        name, (ours, theirs) = next(iter(other.items()))
        raise CheckpointError(
            f"{hparams_file}: its keys make {name} {ours!r:.80}, and config.json says {theirs!r:.80}; leave keys out "
            "that decide what the model computes"
        )


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


def nemo_to_hf(
    source: Path,
    output: Path,
    *,
    precision: str | None,
    overwrite: bool,
    families: Collection[str] = (),
    verify: bool = True,
) -> None:
    """Convert `source`, a `.nemo` archive or extracted folder, to the Hugging Face folder `output`.

    Args:
        source: as written by `hf_to_nemo`, by a training run at any layout, or by NeMo (torch_dist weights).
        output: the folder; appears only when it is complete.
        precision: `32`, `bf16` or `16` to convert the weights; None keeps their dtype.
        overwrite: replace an existing `output`.
        families: the families that are meant, by `model_type`; any that is supported if empty.
        verify: read the folder again and compare every parameter with `source` before it gets its name.

    Raises:
        ArchitectureError, CheckpointError, TokenizerError: anything missing, damaged, unsupported, unmatched or not
            meant.
    """
    check_folder_target(output, overwrite=overwrite)
    dtype = dtype_of(precision)
    with temporary_folder(output) as target, open_nemo(source, target.parent, families) as nemo:
        check_family(nemo.family.model_type, families, str(source))
        Architecture.parse(nemo.config)  # refuses what has no counterpart in config.json
        entries = nemo.entries(dtype)
        write_safetensors(target, entries, nemo.tensors(dtype, "to Hugging Face"))
        hf_config = nemo.hf_config()
        name = "dtype" if "dtype" in hf_config else "torch_dtype"  # transformers 5 and 4
        if name in hf_config or dtype is not None:
            hf_config[name] = str(entries[0].dtype).removeprefix("torch.")
        write_json(target / CONFIG, hf_config)
        if generation := (nemo.config.get("huggingface") or {}).get("generation_config"):
            write_json(target / GENERATION_CONFIG, generation)
        export_tokenizer(nemo.config.get("tokenizer") or {}, nemo.folder, target)
        if verify:
            check_same(nemo, open_hf(target), dtype)
        move_into_place(target, output)
    logger.info("wrote %s", output)


@contextlib.contextmanager
def temporary_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, on its file system, gone afterwards; an error of the system becomes `io_error`'s."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as parent:
            folder = Path(parent) / "content"
            folder.mkdir()
            yield folder
    except OSError as error:
        raise io_error(error, output) from error


def check_folder_target(output: Path, *, overwrite: bool) -> None:
    """Refuse to write onto something that exists, unless asked to; never replace what is no earlier export.

    Raises:
        CheckpointError: it exists, and `overwrite` is false, or it is no folder with the files of a model or an adapter
            and nothing else.
    """
    archive.check_target(output, overwrite=overwrite)
    entries = list(output.iterdir()) if output.is_dir() else []
    foreign = [entry.name for entry in entries if not _is_exported(entry)]
    known = not entries or any((output / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))
    if output.exists() and (foreign or not known or not output.is_dir()):
        what = f"it holds {sorted(foreign)[0]!r}" if foreign else f"it holds no {CONFIG}"
        raise CheckpointError(
            f"{output}: is not overwritten, for it is no folder of an earlier export ({what}); choose another one"
        )


def _is_exported(entry: Path) -> bool:
    """Whether it may be of an earlier export."""
    if entry.is_dir():
        return entry.name == TEMPLATES and all(file.suffix == ".jinja" for file in entry.iterdir())
    return entry.suffix in EXPORTED


def move_into_place(folder: Path, output: Path) -> None:
    """Rename `folder` to `output`; what was there before goes only after the new one is complete and on the disk."""
    for path in [*folder.rglob("*"), folder]:
        archive.sync_folder(path)
    old = folder.parent / "replaced"
    try:
        if output.exists():
            output.rename(old)
        folder.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    archive.sync_folder(output.parent)
