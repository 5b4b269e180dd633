"""Slices applied to tensors: cut a rank's part out, paste it back into a whole. Knows no modules, no groups.

    whole  q0 q1 k0 k1 v0 v1   ──cut(rank 1)──►   q1 k1 v1   ──paste──►   0 q1 0 k1 0 v1

A dim that is a multiple of the slice's size is counted as (others × size): batch × heads, say.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from shardwise.describe.tensor import Ranges, Slice
from shardwise.errors import DataflowError

__all__ = ["cut", "join", "local_shape", "paste", "spread", "whole_shape"]


def spread(dim: int, size: int, ranks: int) -> Slice:
    """One run of indices for each rank, in order; sizes differ by one at most (an odd vocabulary, say).

        7 among 3 ranks:  0 1 │ 2 3 │ 4 5 6

    Raises `LayoutError` where there are fewer indices than ranks.
    """
    starts = [rank * size // ranks for rank in range(ranks + 1)]
    return Slice(dim=dim, size=size, ranges=tuple(((a, b),) for a, b in itertools.pairwise(starts)))


def local_shape(shape: Sequence[int], part: Slice, rank: int) -> tuple[int, ...]:
    """The shape on `rank` of a tensor of the whole `shape`."""
    sizes = list(shape)
    sizes[part.dim] = _others(sizes[part.dim], part.size) * part.local_size(rank)
    return tuple(sizes)


def whole_shape(shape: Sequence[int], part: Slice, rank: int) -> tuple[int, ...]:
    """The whole shape of a tensor that has the local `shape` on `rank`."""
    sizes = list(shape)
    sizes[part.dim] = _others(sizes[part.dim], part.local_size(rank)) * part.size
    return tuple(sizes)


def cut(whole: torch.Tensor, part: Slice, rank: int, *, owned: bool = False) -> torch.Tensor:
    """The part of `rank`, contiguous and with storage of its own.

    With `owned` what a lower rank counts is zero. Raises `DataflowError` where the tensor does not fit the slice.
    """
    dim = part.dim % whole.dim()
    folded = whole.unflatten(dim, (_others(whole.shape[dim], part.size), part.size))  # type: ignore[no-untyped-call]
    local = whole.new_empty(local_shape(whole.shape, part, rank))
    places = local.unflatten(dim, (folded.shape[dim], part.local_size(rank)))  # type: ignore[no-untyped-call]
    at = 0
    for start, stop in part.ranges[rank]:
        places.narrow(dim + 1, at, stop - start).copy_(folded.narrow(dim + 1, start, stop - start))
        at += stop - start
    if owned and part.shared:
        for start, stop in _local(part, rank, _not_owned(part, rank)):
            places.narrow(dim + 1, start, stop - start).zero_()
    return local  # no view: code that is given it may write into it


def paste(local: torch.Tensor, part: Slice, rank: int, *, owned: bool = False) -> torch.Tensor:
    """A whole tensor with the part of `rank` in its place, zero elsewhere; with `owned` only what `rank` counts."""
    dim = part.dim % local.dim()
    num = _others(local.shape[dim], part.local_size(rank))
    folded = local.unflatten(dim, (num, part.local_size(rank)))  # type: ignore[no-untyped-call]
    whole = torch.zeros(whole_shape(local.shape, part, rank), dtype=local.dtype, device=local.device)
    places = whole.unflatten(dim, (num, part.size))  # type: ignore[no-untyped-call]
    at = 0
    for start, stop in part.ranges[rank]:
        places.narrow(dim + 1, start, stop - start).copy_(folded.narrow(dim + 1, at, stop - start))
        at += stop - start
    if owned and part.shared:
        for start, stop in _not_owned(part, rank):
            places.narrow(dim + 1, start, stop - start).zero_()
    return whole  # no view: code that is given it may write into it


def join(parts: Sequence[torch.Tensor], part: Slice, *, within: float) -> torch.Tensor | None:
    """The whole of the ranks' parts, in their order; None where an index that several hold differs on them by more
    than `within`, relative."""
    dim = part.dim % parts[0].dim()
    whole = torch.zeros(whole_shape(parts[0].shape, part, 0), dtype=parts[0].dtype, device=parts[0].device)
    places = whole.unflatten(dim, (_others(whole.shape[dim], part.size), part.size))  # type: ignore[no-untyped-call]
    held = torch.zeros(part.size, dtype=torch.bool)
    for rank, local in enumerate(parts):
        folded = local.unflatten(dim, (places.shape[dim], part.local_size(rank)))  # type: ignore[no-untyped-call]
        at = 0
        for start, stop in part.ranges[rank]:
            mine, place = folded.narrow(dim + 1, at, stop - start), places.narrow(dim + 1, start, stop - start)
            again = held[start:stop].nonzero().flatten()
            if len(again):
                new, old = mine.index_select(dim + 1, again), place.index_select(dim + 1, again)
                if bool(((new - old).abs() > within * old.abs().clamp(min=1e-9)).any()):
                    return None
            place.copy_(mine)
            held[start:stop] = True
            at += stop - start
    return whole


def _others(size: int, of: int) -> int:
    if size % of:
        raise DataflowError(f"a dim that is divided by heads has a multiple of {of} elements, and this one has {size}")
    return size // of


def _not_owned(part: Slice, rank: int) -> Ranges:
    own = part.owned(rank)
    kept = {index for start, stop in own for index in range(start, stop)}
    held = [index for start, stop in part.ranges[rank] for index in range(start, stop)]
    return tuple((index, index + 1) for index in held if index not in kept)


def _local(part: Slice, rank: int, ranges: Ranges) -> list[tuple[int, int]]:
    """Where single indices of the whole stand in the part of `rank`."""
    held = [index for start, stop in part.ranges[rank] for index in range(start, stop)]
    place = {index: at for at, index in enumerate(held)}
    return [(place[start], place[start] + 1) for start, _ in ranges]
