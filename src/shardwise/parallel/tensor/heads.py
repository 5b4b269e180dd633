"""Attention that is one call of torch, `F.multi_head_attention_forward`, divided by heads: `nn.MultiheadAttention` too.

    x ──copy──► q, k, v of rank t's heads ──► attention ──► rank t's columns of the output ──all-reduce──► y + b

Torch's fused kernels for inference take weights as they are, and know nothing of parts; inside `DividedHeads` torch
does not choose them. Knows the call, not what holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.collectives import TensorGroup, copy_to, gather_from, reduce_from, scatter_to
from shardwise.trace.multi_head import MultiHead, attended, masked, projected, returned

__all__ = ["DividedHeads", "fuses"]


def fuses(unit: nn.Module) -> bool:
    """Whether torch may run a part of `unit` as one kernel that takes the weights as they are."""
    return any(isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)) for module in unit.modules())


class DividedHeads(TorchFunctionMode):
    """Inside, attention whose output projection holds a share of the columns is computed for that share of the heads.

    `copy` makes of a whole activation one whose gradient is summed over the ranks.
    """

    def __init__(self, group: TensorGroup, copy: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self._group = group
        self._copy = copy or (lambda x: copy_to(x, group))

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        call = MultiHead.of(args, kwargs)
        if call.out_proj_weight.shape[1] == call.embed_dim_to_check:
            return func(*args, **kwargs)
        return self._divided(call)

    def _divided(self, call: MultiHead) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = Slice.even(1, call.num_heads, self._group.size)
        mask, causal = masked(call)
        if mask is not None:
            mask = scatter_to(mask, heads, self._group) if mask.shape[1] > 1 else copy_to(mask, self._group)
        out, weights = attended(call, *projected(call, self._copy), mask, causal)
        total = reduce_from(F.linear(out, call.out_proj_weight), self._group)
        if weights is not None:
            weights = gather_from(weights, heads, self._group)
        return returned(call, total if call.out_proj_bias is None else total + call.out_proj_bias, weights)
