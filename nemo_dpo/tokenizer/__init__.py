"""Tokenizers of a checkpoint, behind one small interface, and their way into a Hugging Face folder."""

from nemo_dpo.tokenizer.load import (
    ARTEFACT,
    HF_FILES,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    copy_hf_files,
    export_tokenizer,
    load_tokenizer,
    resolve_artefact,
)

__all__ = [
    "ARTEFACT",
    "HF_FILES",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerError",
    "copy_hf_files",
    "export_tokenizer",
    "load_tokenizer",
    "resolve_artefact",
]
