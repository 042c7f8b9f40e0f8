"""Whether two checkpoints are the same model: configuration, parameters to the bit, tokenizer, logits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_dpo.convert.compare import Comparison, Difference, compare
from nemo_dpo.convert.logits import PROMPTS, TOLERANCE, LogitsDifference, largest_difference, logits_of, prompt_ids
from nemo_dpo.convert.opened import Opened, open_checkpoint
from nemo_dpo.tokenizer import TokenizerError

SHOWN = 10  # parameters that differ, named one by one


def verify(left: Path, right: Path, *, dtype: torch.dtype | None = None, logits: bool = True) -> tuple[bool, list[str]]:
    """Compare two checkpoints of any format.

    Args:
        left, right: a Hugging Face folder, a `.nemo` archive or an extracted one.
        dtype: compare the parameters after converting both to it; None compares them as they are.
        logits: also compute with both, which takes the whole model in fp32, one after the other.

    Returns:
        Whether they are the same, and what to tell the user, line by line.

    Raises:
        ArchitectureError, CheckpointError: they cannot be compared.
    """
    with open_checkpoint(left) as a, open_checkpoint(right) as b:
        found = compare(a, b, dtype)
        lines = list(_parameter_lines(found))
        same_ids, line, prompts = _tokenizers(a, b)
        lines.append(line)
        equal = found.equal and same_ids
        if not logits:
            lines.append("logits: skipped")
        elif prompts is None:
            lines.append("logits: not compared, for want of a tokenizer")
        elif _shapes_differ(found):
            lines.append("logits: not compared, the models are of different shapes")
        else:
            apart = _logits(a, b, prompts)
            lines.append(_logits_line(apart))
            equal = equal and apart.equal
    return equal, [*lines, "equal" if equal else "different"]


def _parameter_lines(found: Comparison) -> Iterator[str]:
    for key, (mine, theirs) in found.config.items():
        yield f"configuration: {key} is {mine!r} in the first, {theirs!r} in the second"
    if not found.parameters:
        yield f"parameters: {found.compared}, equal to the bit"
        return
    yield f"parameters: {found.compared} compared, {len(found.parameters)} differ"
    for difference in found.parameters[:SHOWN]:
        yield f"  {_described(difference)}"
    if len(found.parameters) > SHOWN:
        yield f"  … and {len(found.parameters) - SHOWN} more"
    if found.largest:
        yield f"largest difference: {_described(found.largest)}"


def _described(difference: Difference) -> str:
    text = f"{difference.name}: {difference.what}"
    if place := difference.place:
        text += f", at most {place.amount:.3g} at {list(place.at)}: {place.left:.9g} and {place.right:.9g}"
    return text


def _shapes_differ(found: Comparison) -> bool:
    return any(difference.place is None for difference in found.parameters)


def _tokenizers(left: Opened, right: Opened) -> tuple[bool, str, list[list[int]] | None]:
    """(no difference found, what to tell, the prompts as ids of the first)."""
    try:
        mine = prompt_ids(left)
        theirs = prompt_ids(right)
    except TokenizerError as error:
        return True, f"tokenizer: not compared ({error})", None
    wrong = [text for text, a, b in zip(PROMPTS, mine, theirs, strict=True) if a != b]
    if wrong:
        return False, f"tokenizer: other ids for {len(wrong)} of {len(PROMPTS)} texts, {wrong[0]!r} among them", mine
    return True, f"tokenizer: the same ids for {len(PROMPTS)} texts", mine


def _logits(left: Opened, right: Opened, prompts: list[list[int]]) -> LogitsDifference:
    mine = logits_of(left, prompts)
    gc.collect()  # the first model goes before the second one comes
    return largest_difference(mine, logits_of(right, prompts))


def _logits_line(apart: LogitsDifference) -> str:
    allowed = TOLERANCE * apart.scale
    verdict = "within" if apart.equal else "beyond"
    return (
        f"logits: largest difference {apart.amount:.3g} at prompt {apart.prompt + 1}, position {apart.position}, token "
        f"{apart.token}; {verdict} the tolerance {allowed:.3g} ({TOLERANCE:g} of the largest logit)"
    )
