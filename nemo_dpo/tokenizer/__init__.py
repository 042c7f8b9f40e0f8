"""Tokenizers of a checkpoint, behind one small interface, and their way into a Hugging Face folder."""

from nemo_dpo.tokenizer.compare import PROBE, check_same_tokenizer, differences
from nemo_dpo.tokenizer.export import export_tokenizer
from nemo_dpo.tokenizer.hf_files import (
    HF_FILES,
    TEMPLATES,
    NoTokenizerError,
    TokenizerError,
    copy_hf_files,
    hf_files,
)
from nemo_dpo.tokenizer.load import (
    ARTEFACT,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    resolve_artefact,
)

__all__ = [
    "ARTEFACT",
    "HF_FILES",
    "PROBE",
    "TEMPLATES",
    "HuggingFaceTokenizer",
    "NoTokenizerError",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerError",
    "check_same_tokenizer",
    "copy_hf_files",
    "differences",
    "export_tokenizer",
    "hf_files",
    "load_tokenizer",
    "resolve_artefact",
]
