"""What an optimizer updates on a rank: a parameter, its float32 master, or the elements of it that are here.

    parameter w (6, 4)      row-major  0 1 2 3 4 5 6 7 8 │ 9 … 23        a state: start=9, 15 elements, shape (6, 4)

Knows tensors and shapes; refuses to know optimizers, groups and why a tensor is divided.
"""

from __future__ import annotations

import dataclasses
import math

import torch.nn as nn

__all__ = ["State"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class State:
    """`parameter` has a value and, behind a step, a gradient; an optimizer writes into it.

    It is the tensor of this rank (a shard's part of a model's parameter, of that `shape`), in that shape, or, flat, the
    elements from `start` on in row-major order.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all elements are here."""
        return self.parameter.numel() == math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is of two dims or more: not a bias, a norm, a scalar."""
        return len(self.shape) >= 2
