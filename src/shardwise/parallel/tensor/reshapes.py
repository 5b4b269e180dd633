"""Reshapes to sizes that a forward takes from whole tensors: `y.reshape(batch, tokens, width)` of half the width.

Where no attribute says the size, the plan says which dim of the reshape is the divided one. Knows view and reshape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Reshaping", "misfit"]

_RESHAPES = frozenset({torch.Tensor.view, torch.Tensor.reshape, torch.reshape})
_Arguments = tuple[Any, ...]


def misfit(func: Callable[..., Any], args: _Arguments) -> tuple[tuple[int, ...], int] | None:
    """The sizes of a reshape that asks for `factor` times the elements that there are, and the factor; else None."""
    if func not in _RESHAPES or len(args) < 2 or not isinstance(args[0], torch.Tensor):
        return None
    sizes = args[1:] if isinstance(args[1], int) else args[1]
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    wanted, present = math.prod(sizes), args[0].numel()
    if not present or wanted == present or wanted % present:
        return None
    return tuple(int(size) for size in sizes), wanted // present


class Reshaping(TorchFunctionMode):
    """Inside, the n-th reshape that asks for too much has its dim `dims[n]` divided."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self._dims = dims
        self._number = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: _Arguments = (), kwargs: Any = None
    ) -> Any:
        wrong = misfit(func, args) if func in _RESHAPES else None
        if wrong is None or self._number >= len(self._dims):
            return func(*args, **(kwargs or {}))
        sizes, factor = wrong
        dim = self._dims[self._number]
        self._number += 1
        return func(args[0], [size // factor if at == dim else size for at, size in enumerate(sizes)])
