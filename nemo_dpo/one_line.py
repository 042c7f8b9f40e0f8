"""What a library says in an error, for a message of one line."""

from __future__ import annotations

LENGTH = 300


def one_line(error: BaseException) -> str:
    """The first characters of the error's text, or the name of an error that says nothing."""
    return " ".join(str(error).split())[:LENGTH] or type(error).__name__
