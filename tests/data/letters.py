"""A tokenizer whose ids a reader can work out by hand, and jsonl files to go with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

EOS = 256
TH = 257


class Letters:
    """UTF-8 bytes are the ids, but "th" is one token and "¶" is eos: what a merge and a special token do."""

    eos_id = EOS
    pad_id = EOS

    def __init__(self, fingerprint: str = "letters") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for letter in text.replace("th", "\N{LATIN SMALL LETTER THORN}"):
            special = {"þ": [TH], "¶": [EOS]}
            ids += special.get(letter, list(letter.encode()))
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.calls += 1
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join({TH: "th", EOS: "¶"}.get(i) or chr(i) for i in ids)


def row(prompt: str, chosen: str, rejected: str, **more: object) -> dict[str, object]:
    return {"prompt": prompt, "chosen_response": chosen, "rejected_response": rejected, **more}


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
