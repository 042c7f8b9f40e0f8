"""What the ranks of one host have said: those that fail alike say so once, and whoever fails alone is heard.

The ranks cannot ask each other any more when one has failed, so what has been said stands in a file that all of them
opened when they started. This module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from types import TracebackType


class Board:
    """A file by which processes that name it alike know each other's texts. Open it before the ranks first meet.

    It is deleted when the first of them ends; the others go on with what they hold open. Where all are killed it stays
    behind, empty.
    """

    def __init__(self, name: str) -> None:
        self._path = Path(tempfile.gettempdir()) / f"nemo_dpo_{os.getuid()}_{name}"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(self._path, flags, mode=0o600), "a+b", buffering=0)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()

    def is_news(self, text: str) -> bool:
        """Whether nobody has said `text` so far; from now on somebody has."""
        entry = hashlib.sha256(text.encode()).hexdigest().encode() + b"\n"
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            self._file.seek(0)
            news = entry not in self._file.readlines()
            if news:
                with contextlib.suppress(OSError):  # on a full disk a text is said more than once, and not never
                    self._file.write(entry)
            return news
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
