"""Secrets have no place in a configuration: it is saved, shown and sent to experiment trackers, as the command line is.

Keys of Weights & Biases, Neptune and others are read from the environment by their own packages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nemo_dpo.config.schema import Config

NAMES = re.compile(r"api_?key|access_?key|token(?!s|i)|passw(or)?d|secret|credential", re.I)
SHORTEST = 16  # characters of a value of the environment that is looked for
# What a value shows of itself, in the forms that their makers have documented.
VALUES = {
    "a password in an address": re.compile(r"://[^/\s:@]*:[^/\s@]+@"),
    "a token of Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a token of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}"),
    "a key of Weights & Biases": re.compile(r"\bwandb_v\d_\w{20,}"),
    "a key of OpenAI or Anthropic": re.compile(r"(?<![\w./-])sk-[A-Za-z0-9_-]{20,}"),
    "a key of AWS": re.compile(r"\bA(?:KI|SI)A[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def secrets(cfg: Config) -> Iterator[str]:
    """One line per value that is a secret by its name or by its looks; the value itself is not in it."""
    of_environment = {
        value: name for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST
    }
    for path, value in _texts(asdict(cfg)):
        found = [f"the value of {name}" for secret, name in of_environment.items() if secret in value]
        found += [what for what, pattern in VALUES.items() if pattern.search(value)]
        if NAMES.search(path.rpartition(".")[2]):
            found.append("by its name a secret")
        if found:
            yield (
                f"{path} holds {found[0]}, which would be saved with the run; take it out and hand it over in the "
                "environment, for example as WANDB_API_KEY, NEPTUNE_API_TOKEN or MLFLOW_TRACKING_PASSWORD"
            )


def _texts(tree: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of all texts that are not empty."""
    items: Sequence[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    elif isinstance(tree, str) and tree:
        yield path, tree
    for name, value in items:
        yield from _texts(value, f"{path}.{name}" if path else str(name))
