"""The one exception of this package; kept alone so that every module of it may raise it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be run: names the key, its value, the limit and what to write instead."""
