"""Preference pairs: jsonl lines → tokens on disk → the pairs of a step → micro-batches.

Importing this package needs numpy only; the tensors are in `nemo_dpo.data.batch`, which imports torch.
"""

from nemo_dpo.data.dataset import PairDataset, PreparedSplit, open_split, prepare_split
from nemo_dpo.data.report import DataReport, make_report
from nemo_dpo.data.sampler import PairSampler, validation_batches
from nemo_dpo.data.tokenize import Tokenizer
from nemo_dpo.data.types import DataError, DataOptions, PreferencePair, TokenPair

__all__ = [
    "DataError",
    "DataOptions",
    "DataReport",
    "PairDataset",
    "PairSampler",
    "PreferencePair",
    "PreparedSplit",
    "TokenPair",
    "Tokenizer",
    "make_report",
    "open_split",
    "prepare_split",
    "validation_batches",
]
