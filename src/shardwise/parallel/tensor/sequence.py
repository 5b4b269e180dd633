"""Tokens dealt out among the ranks that share a unit, as differentiable functions. Knows tensors, no modules.

                  forward                    backward
    scatter       own tokens                 all-gather         whole → tokens of rank t
    gather        all-gather                 own tokens         tokens → whole, for work that every rank repeats
    gather_copy   all-gather                 reduce-scatter     tokens → whole, for each rank's part of the work
    reduce        reduce-scatter             all-gather         partial sums → tokens of rank t

The last two are g and its conjugate of Korthikanti et al. 2022 (arXiv:2205.05198, figure 5): together they move the
bytes of the all-reduces of `copy_to` and `reduce_from`. Rank t of n has tokens [t·s/n, (t+1)·s/n) of s, so numbers
differ by one at most; what is sent is padded to the largest.

A dim of samples × tokens is `others` runs of `size` tokens each, and each run is dealt out.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from shardwise.parallel.tensor.collectives import TensorGroup

__all__ = ["Regathered", "Tokens", "gather", "gather_copy", "reduce", "scatter"]


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """Where a tensor has its tokens: dim `dim` (negative) holds `others` runs of `size`.

    A run may be a part of what was dealt out: tokens [first, first + size) of `of`, each where it was before.
    """

    dim: int
    size: int
    others: int = 1
    first: int = 0
    of: int | None = None

    @property
    def extent(self) -> int:
        """Elements along the dim of the whole tensor."""
        return self.others * self.size

    def at(self, dim: int, others: int | None = None) -> Tokens:
        """The same tokens in another dim."""
        return Tokens(dim, self.size, self.others if others is None else others, self.first, self.of)

    def bounds(self, rank: int, ranks: int) -> tuple[int, int]:
        """The tokens of a rank, of each run."""
        return rank * self.size // ranks, (rank + 1) * self.size // ranks

    def num(self, rank: int, ranks: int) -> int:
        """How many tokens of each run a rank has; none, where there are fewer than ranks."""
        start, stop = self.bounds(rank, ranks)
        return stop - start

    def of_rank(self, whole: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        """The part of this rank, with storage of its own."""
        start, stop = self.bounds(group.rank, group.size)
        runs = whole.unflatten(self.dim, (self.others, self.size))  # type: ignore[no-untyped-call]
        own = runs.narrow(self.dim, start, stop - start).clone(memory_format=torch.contiguous_format)
        return own.flatten(self.dim - 1, self.dim)  # type: ignore[no-any-return]


def scatter(whole: torch.Tensor, tokens: Tokens, group: TensorGroup) -> torch.Tensor:
    """This rank's tokens of what is the same on every rank."""
    return _Scatter.apply(whole, tokens, group)  # type: ignore[no-any-return, no-untyped-call]


def gather(local: torch.Tensor, tokens: Tokens, group: TensorGroup) -> torch.Tensor:
    """All tokens, for work that every rank repeats: its gradient is the same on every rank."""
    return _Gather.apply(local, tokens, group, False)  # type: ignore[no-any-return, no-untyped-call]


def gather_copy(local: torch.Tensor, tokens: Tokens, group: TensorGroup) -> torch.Tensor:
    """All tokens, for this rank's part of the work: gradients are summed over the ranks."""
    return _Gather.apply(local, tokens, group, True)  # type: ignore[no-any-return, no-untyped-call]


def reduce(partial: torch.Tensor, tokens: Tokens, group: TensorGroup) -> torch.Tensor:
    """This rank's tokens of the sum over the ranks."""
    return _Reduce.apply(partial, tokens, group)  # type: ignore[no-any-return, no-untyped-call]


class Regathered:
    """A gathered tensor of which a backward keeps this rank's tokens alone: who needs all gathers them once more.

    All who saved it share one gathering, from the first who asks until the last one has. Ranks ask in one order: that
    of their backward.
    """

    def __init__(self, local: torch.Tensor, tokens: Tokens, group: TensorGroup) -> None:
        self._local = local.detach()
        self._tokens = tokens
        self._group = group
        self._num_saved = 0
        self._num_asked = 0
        self._kept: torch.Tensor | None = None

    @contextlib.contextmanager
    def instead_of(self, whole: torch.Tensor) -> Iterator[None]:
        """What functions inside the block save of the memory of `whole` is this."""
        storage = whole.untyped_storage()._cdata

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.untyped_storage()._cdata != storage or not tensor.numel():
                return tensor
            self._num_saved += 1
            return tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> torch.Tensor:
            return packed if isinstance(packed, torch.Tensor) else self._whole().as_strided(*packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _whole(self) -> torch.Tensor:
        if self._kept is None:
            with torch.no_grad():
                self._kept = _all_gather(self._local, self._tokens, self._group).contiguous()
        whole = self._kept
        self._num_asked += 1
        if self._num_asked % self._num_saved == 0:
            self._kept = None
        return whole


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, tokens: Tokens, group: TensorGroup) -> torch.Tensor:
        ctx.tokens, ctx.group = tokens, group
        return _no_view(tokens.of_rank(whole, group))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _all_gather(gradients[0], ctx.tokens, ctx.group), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, tokens: Tokens, group: TensorGroup, sums: bool) -> torch.Tensor:
        ctx.tokens, ctx.group, ctx.sums = tokens, group, sums
        return _no_view(_all_gather(local, tokens, group))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if ctx.sums:
            return _reduce_scatter(gradients[0], ctx.tokens, ctx.group), None, None, None
        return ctx.tokens.of_rank(gradients[0], ctx.group), None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, tokens: Tokens, group: TensorGroup) -> torch.Tensor:
        ctx.tokens, ctx.group = tokens, group
        return _no_view(_reduce_scatter(partial, tokens, group))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _all_gather(gradients[0], ctx.tokens, ctx.group), None, None


def _no_view(made: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor that may be written into: autograd forbids that of views that functions return."""
    alias = made.new_empty(0)
    alias.set_(made.detach())  # type: ignore[call-overload]
    return alias


def _most(tokens: Tokens, ranks: int) -> int:
    return -(-tokens.size // ranks)


def _all_gather(local: torch.Tensor, tokens: Tokens, group: TensorGroup) -> torch.Tensor:
    """(..., others · own, rest) of each rank → (..., others · size, rest)."""
    dim, ranks, most = tokens.dim, group.size, _most(tokens, group.size)
    own = tokens.num(group.rank, ranks)
    runs = local.unflatten(dim, (tokens.others, own))  # type: ignore[no-untyped-call]
    stacked = group.all_gather(_padded(runs, dim, most - own).contiguous())  # (ranks, ..., others, most, rest)
    if tokens.size % ranks == 0:
        at = runs.dim() + dim  # the dim of a run's tokens; in `stacked` that of the runs
        return stacked.movedim(0, at).flatten(at - 1, at + 1)
    parts = [stacked[rank].narrow(dim, 0, tokens.num(rank, ranks)) for rank in range(ranks)]
    return torch.cat(parts, dim).flatten(dim - 1, dim)


def _reduce_scatter(partial: torch.Tensor, tokens: Tokens, group: TensorGroup) -> torch.Tensor:
    """(..., others · size, rest), summed over the ranks → (..., others · own, rest)."""
    dim, ranks, most = tokens.dim, group.size, _most(tokens, group.size)
    if tokens.size % ranks == 0:
        runs = partial.unflatten(dim, (tokens.others, ranks, most))  # type: ignore[no-untyped-call]
        stacked = runs.movedim(dim - 1, 0)
    else:
        runs = partial.unflatten(dim, (tokens.others, tokens.size))  # type: ignore[no-untyped-call]
        pieces = [runs.narrow(dim, *_run(tokens, rank, ranks)) for rank in range(ranks)]
        stacked = torch.stack([_padded(piece, dim, most - piece.shape[dim]) for piece in pieces])
    own = tokens.num(group.rank, ranks)
    mine = group.reduce_scatter(stacked.contiguous())  # (..., others, most, rest)
    return mine.narrow(dim, 0, own).contiguous().flatten(dim - 1, dim)


def _run(tokens: Tokens, rank: int, ranks: int) -> tuple[int, int]:
    start, stop = tokens.bounds(rank, ranks)
    return start, stop - start


def _padded(runs: torch.Tensor, dim: int, missing: int) -> torch.Tensor:
    if not missing:
        return runs
    return F.pad(runs, (*[0, 0] * (-dim - 1), 0, missing))
