"""What readers of distributed checkpoints have in common, whichever files they read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a distributed checkpoint by key, read when asked for; other objects in it are left out."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter, `[layers, …]` if stacked; reads no data."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """dtype of the parameter; reads no data."""

    @abstractmethod
    def layer(self, name: str, index: int) -> torch.Tensor:
        """Layer `index` of a stacked parameter, without the leading dimension; reads the chunks of that layer only."""
