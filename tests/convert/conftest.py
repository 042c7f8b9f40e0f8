"""Tiny random models and tokenizers, made by transformers and tokenizers themselves, for the converters' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

CORPUS = [
    *["x\n\n"] * 50,  # makes a token of two line breaks: whether a digit after it is cut off shows then
    "The quick brown fox jumps over the lazy dog. 0123456789 3.14159 1,000,000",
    "def add(a, b):\n    return a + b  # 2 + 2 == 4\n",
    "naïve café, Ελληνικά, кириллица, 東京タワー, العربية, हिन्दी, 🙂",
]
TEXT = "\n\n1. for i in range(1889):\n\tprint('東京 é 🙂', i**2)  the fox, кот, ΑΒΓ; <|im_end|>\nनमस्ते مرحبا"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROPE = {"rope_type": "default", "rope_theta": 100000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BASE: dict[str, Any] = {
    "vocab_size": 301,  # no multiple of the padding
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE,
    "tie_word_embeddings": False,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "gqa_9_3_untied": {},
    "gqa_9_3_tied": {"tie_word_embeddings": True},
    "head_dim_not_hidden_over_heads": {"head_dim": 24},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "one_group": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "llama3_rope": {"rope_parameters": LLAMA3},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "all_biases": {"attention_bias": True, "mlp_bias": True},
    "vocabulary_of_a_whole_multiple": {"vocab_size": 384},
}


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 300 tokens with a chat template and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(  # adds a bos, unless told not to
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, config: Any, *, dtype: torch.dtype = torch.float32, **save_options: Any) -> Any:
    """A random model in which no parameter keeps a tell-tale initial value (norms of one, biases of zero)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + 0.1)
    model.save_pretrained(folder, **save_options)
    save_tokenizer(folder)
    return model


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    """Make a tiny Llama folder: llama(**changes of BASE) → its path."""

    def make(name: str = "hf", *, dtype: torch.dtype = torch.float32, options: Any = None, **changes: Any) -> Path:
        from transformers import LlamaConfig

        config = LlamaConfig(**{**BASE, **changes}, eos_token_id=2, bos_token_id=1, dtype=dtype)
        save_model(tmp_path / name, config, dtype=dtype, **(options or {}))
        return tmp_path / name

    return make


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read with safetensors directly."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(left: Path, right: Path) -> None:
    """Same names, dtypes and bits."""
    a, b = hf_tensors(left), hf_tensors(right)
    assert a and a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
