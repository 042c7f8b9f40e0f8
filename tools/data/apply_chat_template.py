#!/usr/bin/env python3
"""Render the prompts of a jsonl file with a model's chat template, as an instruction-tuned model needs them.

    python tools/data/apply_chat_template.py --model mcore_gpt.nemo --input train.jsonl --output train_chat.jsonl

Each prompt becomes the template's text for one user message, up to the point where the assistant's answer begins; all
other fields stay. Most templates end an answer with the end token: train with model.data.append_eod=true.
"""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from nemo_dpo.tokenizer import Tokenizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help=".nemo file, extracted .nemo or Hugging Face folder")
    parser.add_argument("--input", required=True, type=Path, help="jsonl file with plain prompts")
    parser.add_argument("--output", required=True, type=Path, help="the jsonl file to write")
    return parser.parse_args(argv)


def apply_chat_template(model: Path, source: Path, target: Path) -> int:
    """Write the rows of `source` with rendered prompts to `target`; returns their number.

    Args:
        model: where the tokenizer is: a `.nemo` archive or extracted folder, or a Hugging Face folder.

    Raises:
        CheckpointError, TokenizerError: no tokenizer there, or one without a chat template.
        DataError: a line that is not a preference pair, named by file:line.
    """
    from nemo_dpo.checkpoint import archive
    from nemo_dpo.tokenizer import HuggingFaceTokenizer, load_tokenizer

    with ExitStack() as stack:
        if model.is_file() or (model / archive.MODEL_CONFIG).is_file():
            folder = stack.enter_context(archive.open_folder(model, target.absolute().parent, archive.check_any_layout))
            tokenizer: Tokenizer = load_tokenizer(archive.read_model_config(folder)["tokenizer"], folder)
        else:
            tokenizer = HuggingFaceTokenizer.from_name(model)
        with source.open("rb") as lines:  # read whole before writing: target may be source
            rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in render(lines, str(source), tokenizer)]
    target.write_text("".join(rows), encoding="utf-8")
    return len(rows)


def render(lines: Iterable[bytes], file: str, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The rows of a jsonl `file`, each with its prompt in the form of the template; blank lines are left out."""
    from nemo_dpo.data.jsonl import Source, parse_line, parse_row
    from nemo_dpo.data.types import DataOptions

    for number, line in enumerate(lines, start=1):
        if line.strip():
            source = Source(file, number)
            row = parse_line(line.removeprefix(codecs.BOM_UTF8), source)
            pair = parse_row(row, source, DataOptions(seq_length=1))  # checks the fields; no length is looked at
            message = {"role": "user", "content": pair.prompt}
            yield {**row, "prompt": tokenizer.apply_chat_template([message], add_generation_prompt=True)}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemo_dpo.checkpoint import CheckpointError
    from nemo_dpo.data import DataError
    from nemo_dpo.tokenizer import TokenizerError

    try:
        count = apply_chat_template(args.model, args.input, args.output)
    except (CheckpointError, DataError, TokenizerError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"wrote {args.output}: {count} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
