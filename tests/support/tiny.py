"""A tiny random model, its tokenizer and preference pairs, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

VOCABULARY = 259  # 256 bytes and three special tokens: no multiple of anything
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def byte_tokenizer() -> Any:
    """A byte-level tokenizer with bos, eos and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_hf_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama with weights large enough for gradients to matter, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "initializer_range": 0.08, **changes}))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_pairs(path: Path, count: int, seed: int = 0, longest: int = 24) -> Path:
    """`count` pairs of random letters with lengths that differ."""
    letters = random.Random(seed)

    def text(most: int) -> str:
        return "".join(letters.choice("abcdefgh ") for _ in range(letters.randint(3, most))) + "."

    rows = [
        {"prompt": text(longest), "chosen_response": text(longest), "rejected_response": text(longest)}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
