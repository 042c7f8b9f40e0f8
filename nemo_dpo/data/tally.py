"""What happened to the lines of a file, counted: nothing is left out, changed or ignored without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

EXAMPLES = 3
"""Line numbers kept for each reason."""


@dataclass
class Counts:
    """How many lines for each reason, and the first few of them."""

    number: dict[str, int] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        self.number[reason] = self.number.get(reason, 0) + 1
        examples = self.lines.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(line)

    def __iter__(self) -> Iterator[tuple[str, int, list[int]]]:
        """(reason, number, first lines), most frequent first."""
        for reason in sorted(self.number, key=lambda name: (-self.number[name], name)):
            yield reason, self.number[reason], self.lines[reason]


@dataclass
class Tally:
    """Lines left out, lines whose tokens were cut, and what else is worth a remark."""

    dropped: Counts = field(default_factory=Counts)
    changed: Counts = field(default_factory=Counts)
    noted: Counts = field(default_factory=Counts)
