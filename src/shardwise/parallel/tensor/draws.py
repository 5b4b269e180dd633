"""Random draws of divided activations: drawn for the whole tensor, of which a rank keeps its part.

So a dropout mask over the heads of rank t is what one device has there. Knows calls of random functions by their number
within a unit's forward; the numbers themselves come from whoever watches outside (`RandomMode`), as for any draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shardwise.describe.tensor import Slice
from shardwise.errors import ModelError
from shardwise.parallel.tensor.slices import cut, whole_shape
from shardwise.trace.random_calls import is_random

__all__ = ["DividedDraws"]

_DROPOUT = frozenset({F.dropout, torch.dropout})
_Arguments = tuple[Any, ...]


class DividedDraws(TorchFunctionMode):
    """Inside, the draws listed in `draws` (number -> slice of what is drawn) are drawn whole and cut.

    Knows dropout and attention with dropout. Raises `ModelError` for another divided draw.
    """

    def __init__(self, draws: Mapping[int, Slice], rank: int) -> None:
        super().__init__()
        self._draws = draws
        self._rank = rank
        self._number = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: _Arguments = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(func, args, kwargs):
            return func(*args, **kwargs)
        part = self._draws.get(self._number)
        self._number += 1
        if part is None:
            return func(*args, **kwargs)
        if func in _DROPOUT:
            return self._dropout(part, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(part, *args, **kwargs)
        raise ModelError(f"a draw of a divided activation is a dropout, and this one is {func}; use F.dropout there")

    def _noise(self, like: torch.Tensor, p: float, part: Slice) -> torch.Tensor:
        """Zeros and 1 / (1 - p): this rank's part of the whole mask."""
        shape = whole_shape(like.shape, part, self._rank)
        return cut(F.dropout(torch.ones(shape, dtype=like.dtype, device=like.device), p, True), part, self._rank)

    def _dropout(
        self, part: Slice, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any
    ) -> torch.Tensor:
        noise = self._noise(input, p, part)
        return input.mul_(noise) if inplace else input * noise

    def _attention(
        self,
        part: Slice,
        query: torch.Tensor,  # (..., heads, queries, head_dim)
        key: torch.Tensor,  # (..., kv_heads, keys, head_dim)
        value: torch.Tensor,  # (..., kv_heads, keys, value_dim)
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As `trace.randomness` writes attention out, with this rank's part of the mask."""
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)  # (..., heads, queries, keys)
        if is_causal:
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(unseen, -math.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        seen = torch._safe_softmax(scores, -1) if attn_mask is not None else scores.softmax(-1)
        return (seen * self._noise(seen, dropout_p, part) @ value.to(dtype)).to(query.dtype)
