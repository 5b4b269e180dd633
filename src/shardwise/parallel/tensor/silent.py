"""A rank whose peers are silent: a divided unit run alone, for what its shapes and operations tell. Knows no units."""

from __future__ import annotations

import torch

__all__ = ["SilentGroup"]


class SilentGroup:
    """A `TensorGroup` of `size` ranks of which this is the first: sums are what it has itself."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """As many of it as there are ranks."""
        return torch.stack([tensor] * self.size)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its own block."""
        return tensor[self.rank]
