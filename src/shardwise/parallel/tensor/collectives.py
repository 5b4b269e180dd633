"""What crosses between the ranks that share a unit, as differentiable functions. Knows tensors, no modules.

                  forward                      backward
    copy_to       identity                     all-reduce       whole → each rank's part of the work
    reduce_from   all-reduce                   identity         partial sums → whole
    scatter_to    own part                     parts joined     whole → divided
    gather_from   parts joined                 own part         divided → whole

The first two are f and g of Shoeybi et al. 2019 (arXiv:1909.08053, figure 3).
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch

from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.slices import cut, paste

__all__ = ["Carrier", "TensorGroup", "copy_to", "gather_from", "reduce_from", "scatter_to"]


class TensorGroup(Protocol):
    """The ranks that share a unit, seen from one of them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, on every rank. `tensor` is dense and the caller's own: it may be overwritten."""
        ...

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of the ranks' elements, place by place. `tensor` may be overwritten."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors of one shape, in order, as (ranks, *shape) on every rank. `tensor` is dense."""
        ...

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` (ranks, *shape), dense, has a block for every rank: the sum over the ranks of this one's block."""
        ...


class Carrier(torch.Tensor):
    """A tensor without storage, of which a part is here: what ranks of another group do with it, they do with parts."""

    local: torch.Tensor

    @property
    def among(self) -> TensorGroup:
        """The ranks that have the parts."""
        raise NotImplementedError

    @property
    def parted(self) -> int:
        """The dim along which they are parts, negative."""
        raise NotImplementedError

    def carry(self, local: torch.Tensor) -> Self:
        """The same of another part."""
        raise NotImplementedError


def _carries(tensor: torch.Tensor, group: TensorGroup, part: Slice | None = None) -> bool:
    """Whether a function over `group` is one of parts that others have."""
    if not isinstance(tensor, Carrier) or tensor.among is group:
        return False
    return part is None or part.dim % tensor.dim() != tensor.parted % tensor.dim()


def copy_to(whole: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """`whole`, read by this rank's part of the work; its gradient is the sum over the ranks."""
    if _carries(whole, group):
        assert isinstance(whole, Carrier)
        return whole.carry(copy_to(whole.local, group))
    if not (whole.requires_grad and torch.is_grad_enabled()):
        return whole
    return _Copy.apply(whole, group)  # type: ignore[no-any-return, no-untyped-call]


def reduce_from(partial: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The sum of the ranks' `partial`, which is given away: it may be overwritten, if nobody has saved it."""
    if _carries(partial, group):
        assert isinstance(partial, Carrier)
        return partial.carry(reduce_from(partial.local, group))
    return _Reduce.apply(partial.contiguous(), group)  # type: ignore[no-any-return, no-untyped-call]


def scatter_to(whole: torch.Tensor, part: Slice, group: TensorGroup) -> torch.Tensor:
    """This rank's part of `whole`, which is the same on every rank."""
    if _carries(whole, group, part):
        assert isinstance(whole, Carrier)
        return whole.carry(scatter_to(whole.local, part, group))
    return _Scatter.apply(whole, part, group)  # type: ignore[no-any-return, no-untyped-call]


def gather_from(local: torch.Tensor, part: Slice, group: TensorGroup) -> torch.Tensor:
    """The whole tensor of which every rank has its part. What several ranks have is taken from the lowest."""
    if _carries(local, group, part):
        assert isinstance(local, Carrier)
        return local.carry(gather_from(local.local, part, group))
    return _Gather.apply(local, part, group)  # type: ignore[no-any-return, no-untyped-call]


def _no_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of its own: what reads it may write into it."""
    alias = tensor.new_empty(0)
    alias.set_(tensor.detach())  # type: ignore[call-overload]
    return alias


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        ctx.group = group
        return _no_view(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # the same gradient tensor may be read elsewhere: sum a copy of it
        return ctx.group.all_reduce(gradients[0].clone(memory_format=torch.contiguous_format)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        ctx.mark_dirty(partial)
        total = group.all_reduce(partial)
        if total is not partial:
            return partial.copy_(total)
        # a write that torch sees: whoever keeps results below autograd learns that this one is another now
        partial.view(-1).narrow(0, 0, 0).zero_()
        return partial

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, part: Slice, group: TensorGroup) -> torch.Tensor:
        ctx.part, ctx.group = part, group
        return _no_view(cut(whole, part, group.rank))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # what several ranks read gets the gradients of all of them: so whole, not `owned`
        return ctx.group.all_reduce(paste(gradients[0], ctx.part, ctx.group.rank)), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, part: Slice, group: TensorGroup) -> torch.Tensor:
        ctx.part, ctx.group = part, group
        return _no_view(group.all_reduce(paste(local, part, group.rank, owned=True)))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # held by several ranks, an index is counted by its lowest holder; the others' shares are summed elsewhere
        return cut(gradients[0], ctx.part, ctx.group.rank, owned=True), None, None
