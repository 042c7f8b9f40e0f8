"""Checkpoints on disk: `.nemo` archives, their weights, and the sharded training state.

Importing this package loads neither torch nor megatron-core; the modules that need them are imported by name.
"""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, hostile or does not fit; the message names file, reason and remedy."""


class SaveError(CheckpointError):
    """A checkpoint or an archive could not be written: a failure of the run, nothing that its configuration asks."""
