"""What checkpoints are ranked by and called: the figures that a save knows, and names made of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from string import Formatter

from nemo_dpo.config.exp_manager import CheckpointCallbackParams

FIGURES = (
    "loss",
    "preference_loss",
    "sft_loss",
    "acc",
    "rewards_chosen_mean",
    "rewards_rejected_mean",
    "rewards_all_mean",
    "rewards_all_std",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
)
"""What a validation measures (`nemo_dpo.metrics.preference.finalize`); a save knows them behind `val_`."""

POSITION = ("step", "epoch", "consumed_samples")
KNOWN = (*(f"val_{name}" for name in FIGURES), *POSITION)

_SECTION = "exp_manager.checkpoint_callback_params"
_LONGEST = 200  # bytes; a file system takes 255, and a checkpoint that is being written has a longer name


def checkpoint_name(template: str, values: Mapping[str, float]) -> str:
    """A template like `gpt--{val_loss:.3f}-{step}` → `gpt--val_loss=0.512-step=100`, as Lightning writes names.

    Before the first validation its metrics count as 0.

    Raises:
        ValueError: a brace is left open, or a format does not fit its value.
    """
    named = re.sub(r"\{(\w+)", r"\1={\1", template)
    return named.format_map(defaultdict(float, values))


def name_problems(params: CheckpointCallbackParams) -> Iterator[str]:
    """One line per key that could not rank or name a checkpoint."""
    if params.monitor not in KNOWN:
        yield f"{_SECTION}.monitor={params.monitor} is no figure of a validation; {_nearest(params.monitor)}"
    try:
        fields = [field for _, field, _, _ in Formatter().parse(params.filename) if field is not None]
        # Of the types that a save gives.
        name = checkpoint_name(params.filename, {key: 0 if key in POSITION else 0.0 for key in KNOWN})
    except ValueError as error:
        yield f"{_SECTION}.filename={params.filename} cannot be filled in: {error}; write {{val_loss:.3f}} or {{step}}"
        return
    for field in fields:
        if field not in (*KNOWN, params.monitor):  # a wrong monitor is named above
            yield f"{_SECTION}.filename={params.filename} names {field}, which no save knows; {_nearest(field)}"
    if "/" in name or name.startswith(".") or name in ("", "last") or len(name.encode()) > _LONGEST:
        yield (
            f"{_SECTION}.filename={params.filename} gives {name!r}, which must be the name of a folder: without a /, "
            f"without a dot in front, not last, of at most {_LONGEST} bytes; change it"
        )


def _nearest(name: str) -> str:
    near = get_close_matches(name, KNOWN, n=1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(KNOWN)}"
