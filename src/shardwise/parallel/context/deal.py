"""Tokens dealt out among the ranks that divide sequences, as differentiable functions. Knows tensors, no modules.

                  forward                    backward, its exact transpose
    deal          own tokens                 zeros for the others' tokens         whole → tokens of rank c
    join          all-gather                 reduce-scatter                       tokens → whole
    total         all-reduce                 all-reduce                           terms of a sum → the sum

What the ranks differentiate together is the mean over them of the losses that they compute, each L / cp. So a
gradient is what reaches L through this rank, and the gradient of whatever several ranks hold, a parameter say, is the
sum over them: whether they computed with all tokens, with their own, or with both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from shardwise.parallel.context.placement import Placement
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.sequence import Tokens

__all__ = ["deal", "join", "total"]


def deal(whole: torch.Tensor, tokens: Tokens, placement: Placement, context: int) -> torch.Tensor:
    """This rank's tokens of what is the same on every rank, with storage of their own."""
    runs = whole.unflatten(tokens.dim, (tokens.others, tokens.size)) if tokens.others > 1 else whole  # type: ignore[no-untyped-call]
    own = placement.own(runs, tokens.dim, context)
    if tokens.others > 1:
        own = own.flatten(tokens.dim - 1, tokens.dim)
    return own.clone(memory_format=torch.contiguous_format)


def join(local: torch.Tensor, tokens: Tokens, placement: Placement, group: TensorGroup) -> torch.Tensor:
    """All tokens. Collective."""
    return _Join.apply(local, tokens, placement, group)  # type: ignore[no-any-return, no-untyped-call]


def total(term: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The sum of the ranks' terms, on every rank. Collective."""
    return _Total.apply(term, group)  # type: ignore[no-any-return, no-untyped-call]


class _Join(torch.autograd.Function):
    """(..., others · own, rest) of each rank → (..., others · size, rest)."""

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, tokens: Tokens, placement: Placement, group: TensorGroup
    ) -> torch.Tensor:
        ctx.tokens, ctx.placement, ctx.group = tokens, placement, group
        dim, own = tokens.dim, placement.num(group.rank)
        most = max(placement.num(context) for context in range(group.size))
        runs = local.unflatten(dim, (tokens.others, own))  # type: ignore[no-untyped-call]
        stacked = group.all_gather(_padded(runs, dim, most - own).contiguous())  # (ranks, ..., others, most, rest)
        parts = [stacked[context].narrow(dim, 0, placement.num(context)) for context in range(group.size)]
        return _no_view(placement.join(parts, dim).flatten(dim - 1, dim))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        tokens, placement, group = ctx.tokens, ctx.placement, ctx.group
        dim = tokens.dim
        most = max(placement.num(context) for context in range(group.size))
        runs = gradients[0].unflatten(dim, (tokens.others, tokens.size))  # type: ignore[no-untyped-call]
        pieces = [placement.own(runs, dim, context) for context in range(group.size)]
        stacked = torch.stack([_padded(piece, dim, most - piece.shape[dim]) for piece in pieces])
        mine = group.reduce_scatter(stacked.contiguous())  # (..., others, most, rest)
        own = mine.narrow(dim, 0, placement.num(group.rank))
        return own.contiguous().flatten(dim - 1, dim), None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        ctx.group = group
        return group.all_reduce(term.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.group.all_reduce(gradients[0].clone(memory_format=torch.contiguous_format)), None


def _no_view(made: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor that may be written into: autograd forbids that of views that functions return."""
    alias = made.new_empty(0)
    alias.set_(made.detach())  # type: ignore[call-overload]
    return alias


def _padded(runs: torch.Tensor, dim: int, missing: int) -> torch.Tensor:
    return F.pad(runs, (*[0, 0] * (-dim - 1), 0, missing)) if missing else runs
