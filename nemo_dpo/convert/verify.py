"""Whether two checkpoints are the same model: configuration, parameters to the bit, tokenizer, logits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_dpo.convert.compare import Comparison, Difference, compare
from nemo_dpo.convert.logits import PROMPTS, TOLERANCE, LogitsDifference, largest_difference, logits_of, prompt_ids
from nemo_dpo.convert.opened import Opened, open_checkpoint
from nemo_dpo.tokenizer import PROBE, NoTokenizerError, Tokenizer, TokenizerError, differences

SHOWN = 10  # parameters that differ, named one by one


def verify(left: Path, right: Path, *, dtype: torch.dtype | None = None, logits: bool = True) -> tuple[bool, list[str]]:
    """Compare two checkpoints of any format.

    Args:
        left, right: a Hugging Face folder, a GGUF file, a `.nemo` archive or an extracted one.
        dtype: compare the parameters after converting both to it; None compares them as they are.
        logits: also compute with both, which takes the whole model in fp32, one after the other.

    Returns:
        Whether they are the same, and what to tell the user, line by line.

    Raises:
        ArchitectureError, CheckpointError: they cannot be compared.
    """
    with open_checkpoint(left) as a, open_checkpoint(right) as b:
        found = compare(a, b, dtype)
        lines = [*_expansion_lines(a, b), *_parameter_lines(found)]
        same_tokenizer, said, prompts = _tokenizers(a, b)
        lines += said
        equal = found.equal and same_tokenizer
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


def _expansion_lines(left: Opened, right: Opened) -> Iterator[str]:
    for place, side in (("first", left), ("second", right)):
        if side.expanded:
            yield f"the {place} holds {', '.join(side.expanded)}, compared as expanded to float32"


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


def _tokenizers(left: Opened, right: Opened) -> tuple[bool, list[str], list[list[int]] | None]:
    """(no difference found, what to tell, the prompts as ids of the first)."""
    found: list[Tokenizer] = []
    missing, damaged = [], []
    for place, side in (("first", left), ("second", right)):
        try:
            found.append(side.tokenizer())
        except NoTokenizerError as error:
            missing.append(f"tokenizer: not compared ({error})")
        except TokenizerError as error:
            damaged.append(f"tokenizer: that of the {place} cannot be read ({error})")
    if missing or damaged:
        return not damaged, missing + damaged, None
    prompts = prompt_ids(left, found[0])
    if apart := differences(found[0], found[1], (*PROMPTS, *PROBE)):
        return False, [f"tokenizer: {line}" for line in apart], prompts
    special = len(found[0].special_tokens)
    return True, [f"tokenizer: the same, by {len(PROMPTS) + len(PROBE)} texts and {special} special tokens"], prompts


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
