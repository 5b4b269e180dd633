"""Cross-entropy of logits that stay divided by columns: three small sums instead of one large gather.

With z the logits of one token, V of them, T its target and ε the label smoothing:

    m = max z        s = Σ exp(z - m)        t = z_T - m        u = Σ (z - m)          one number a token, each
    loss  = log s - (1 - ε) t - ε u / V
    dz    = softmax(z) - (1 - ε) [T] - ε / V                                           own columns only

The maximum is one all-reduce, the three sums another: 4 numbers a token cross, not V. Shoeybi et al. 2019
(arXiv:1909.08053, section 3) describe it without smoothing. Knows local logits and targets; no modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shardwise.describe.tensor import Slice
from shardwise.errors import DataflowError
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.lookup import local_ids
from shardwise.parallel.tensor.slices import spread

__all__ = ["vocab_parallel_cross_entropy"]

_NARROW = (torch.float16, torch.bfloat16)


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    vocabulary: int,
    group: TensorGroup,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """`F.cross_entropy` of logits of which every rank has its columns, as `ColumnParallelLinear` leaves them.

    logits (..., local), floating, the columns of `spread(-1, vocabulary, group.size)`; target (...), ids of the whole
    vocabulary, the same on every rank. `reduction` is "mean" (over targets that are not `ignore_index`), "sum" or
    "none" (a loss for each target, shape of `target`). The loss is the same on every rank, the gradient of `logits`
    that of the rank's columns. Logits of half precision are summed in float32. Collective, forward only.
    Raises `DataflowError` for shapes, dtypes and reductions that do not fit, `IndexError` (on CPUs) for targets
    outside of the vocabulary.
    """
    part = spread(-1, vocabulary, group.size)
    _check(logits, target, part, group, label_smoothing, reduction)
    losses: torch.Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, target, part, group, ignore_index, label_smoothing
    )
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / (target != ignore_index).sum() if reduction == "mean" else total


def _check(
    logits: torch.Tensor, target: torch.Tensor, part: Slice, group: TensorGroup, smoothing: float, reduction: str
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise DataflowError(f'a reduction is "mean", "sum" or "none", but this one is {reduction!r}; give one of them')
    if not 0.0 <= smoothing <= 1.0:
        raise DataflowError(f"label_smoothing lies between 0 and 1, but it is {smoothing}; give a share")
    if target.is_floating_point() or target.shape != logits.shape[:-1]:
        raise DataflowError(
            f"targets are ids, one for each row of logits: logits {tuple(logits.shape)} want integers of shape "
            f"{tuple(logits.shape[:-1])}, and these are {target.dtype} {tuple(target.shape)}; flatten both alike"
        )
    width = part.local_size(group.rank)
    if logits.shape[-1] != width:
        raise DataflowError(
            f"rank {group.rank} of {group.size} has {width} columns of {part.size} logits, but these are "
            f"{logits.shape[-1]}; leave the logits as a ColumnParallelLinear of {part.size} outputs makes them"
        )


class _CrossEntropy(torch.autograd.Function):
    """Losses (...) of logits (..., local) and targets (...)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        part: Slice,
        group: TensorGroup,
        ignore_index: int,
        smoothing: float,
    ) -> torch.Tensor:
        z = logits.float() if logits.dtype in _NARROW else logits
        top = group.all_reduce_max(z.amax(-1))  # (...)
        z = z - top.unsqueeze(-1)
        ignored = target == ignore_index
        index, elsewhere = local_ids(target.masked_fill(ignored, part.ranges[group.rank][0][0]), part, group.rank)
        own = z.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        parts = [own, z.sum(-1)] if smoothing else [own]
        exponentials = z.exp_()  # z has become this
        sums = group.all_reduce(torch.stack([exponentials.sum(-1), *parts]))  # (2 or 3, ...)
        losses = sums[0].log() - (1.0 - smoothing) * sums[1]
        if smoothing:
            losses -= smoothing / part.size * sums[2]
        softmax = exponentials.div_(sums[0].unsqueeze(-1))
        ctx.save_for_backward(softmax, index, elsewhere | ignored, ignored)
        ctx.smoothing, ctx.size, ctx.dtype = smoothing, part.size, logits.dtype
        return losses.masked_fill_(ignored, 0.0).to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        softmax, index, not_own, ignored = ctx.saved_tensors
        weight = gradients[0].to(softmax.dtype).masked_fill(ignored, 0.0).unsqueeze(-1)  # (..., 1)
        dz = softmax - ctx.smoothing / ctx.size if ctx.smoothing else softmax
        dz = dz * weight
        targets = (ctx.smoothing - 1.0) * weight.masked_fill(not_own.unsqueeze(-1), 0.0)
        dz.scatter_add_(-1, index.unsqueeze(-1), targets)
        return dz.to(ctx.dtype), None, None, None, None, None
