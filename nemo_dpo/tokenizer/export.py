"""A checkpoint's tokenizer, written for Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_dpo.tokenizer.compare import check_same_tokenizer
from nemo_dpo.tokenizer.hf_files import TokenizerError, copy_hf_files
from nemo_dpo.tokenizer.load import (
    FILE_KEYS,
    HuggingFaceTokenizer,
    build_tokenizer,
    file_of,
    form_of,
    hf_source,
    load_tokenizer,
)


def export_tokenizer(config: Mapping[str, Any], folder: Path, target: Path) -> None:
    """Write a checkpoint's tokenizer into the Hugging Face folder `target`, read it again and compare the two.

    What is no Hugging Face tokenizer is built anew as one.

    Args:
        config: the section `tokenizer` of model_config.yaml.
        folder: the extracted `.nemo`.
        target: the folder; its config.json, which decides the tokenizer's class, must be there already.

    Raises:
        TokenizerError: as `load_tokenizer`, or it cannot be written so that it is the same.
    """
    form = form_of(config)
    if form == "huggingface":
        source = Path(hf_source(config, folder))
        if not source.is_dir():
            raise TokenizerError(f"tokenizer {str(source)!r} is not in the checkpoint; name a folder with its files")
        original = load_tokenizer(config, folder)
        copy_hf_files(source, target)
    else:
        original, source = load_tokenizer(config, folder), file_of(config, FILE_KEYS[form][0], folder)
        fast = original if isinstance(original, HuggingFaceTokenizer) else build_tokenizer(form, [source])
        fast.save(target)
    written = HuggingFaceTokenizer.from_name(target)
    check_same_tokenizer(original, written, source.name)
    if form == "sentencepiece":  # beside the tokenizer.json: of it alone transformers would make another tokenizer
        (target / "tokenizer.model").write_bytes(source.read_bytes())
