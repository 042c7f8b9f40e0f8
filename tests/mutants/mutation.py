"""What a deliberate bug is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.mutants.runner import Mutant


@dataclass(frozen=True)
class Mutation:
    """One bug, as a change of text."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, root: Path) -> Mutant:
        """The bug in the file below `root`.

        Raises:
            ValueError: `old` does not occur exactly once there.
        """
        source = (root / self.file).read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {source.count(self.old)} times: {self.old}")
        return Mutant(self.name, self.file, source.replace(self.old, self.new), (self.test,))
