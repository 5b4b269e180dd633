"""Regions of tensors: what they share, what they leave open, and which saved piece fills which wanted part.

Knows offsets and sizes only. Refuses to know torch, files and layouts. Regions are boxes:

    offsets (1, 2), sizes (2, 3) of a (4, 6) tensor, printed as [1:3, 2:5]

        . . . . . .
        . . # # # .
        . . # # # .
        . . . . . .
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardwise.errors import CheckpointError

__all__ = ["HeldTensor", "Read", "SliceTable", "TensorSlice", "boxes_of_run", "check_cover", "first_hole", "plan_reads"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """A box of a tensor: `offsets[d] <= index[d] < offsets[d] + sizes[d]` on every dim, in elements.

    Both tuples are empty for a scalar. Raises CheckpointError when lengths differ or a number is negative.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise CheckpointError(
                f"a slice needs one offset and one size for each dim; got {len(self.offsets)} offsets "
                f"{self.offsets} and {len(self.sizes)} sizes {self.sizes}; give both for every dim"
            )
        if any(number < 0 for number in (*self.offsets, *self.sizes)):
            raise CheckpointError(
                f"offsets and sizes of a slice are counted from 0; got offsets {self.offsets} and sizes "
                f"{self.sizes}; count negative ones from the start of the tensor"
            )

    @classmethod
    def whole(cls, shape: Iterable[int]) -> TensorSlice:
        """The slice that is the whole of a tensor of this shape."""
        sizes = tuple(shape)
        return cls(offsets=(0,) * len(sizes), sizes=sizes)

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def stops(self) -> tuple[int, ...]:
        """The first index past the box on every dim."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{stop}" for o, stop in zip(self.offsets, self.stops, strict=True)) + "]"

    def is_inside(self, shape: Sequence[int]) -> bool:
        """Whether the box lies in a tensor of this shape, with the same number of dims."""
        return len(shape) == len(self.sizes) and all(stop <= size for stop, size in zip(self.stops, shape, strict=True))

    def intersection(self, other: TensorSlice) -> TensorSlice | None:
        """What both boxes share; None where they share no element."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = tuple(map(min, self.stops, other.stops))
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        if any(size <= 0 for size in sizes):
            return None
        return TensorSlice(offsets=starts, sizes=sizes)

    def relative_to(self, origin: TensorSlice) -> TensorSlice:
        """The same box counted from the first element of `origin`, which must contain it."""
        offsets = tuple(mine - its for mine, its in zip(self.offsets, origin.offsets, strict=True))
        return TensorSlice(offsets=offsets, sizes=self.sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """Copy `source` (counted inside piece number `piece`) to `target` (counted inside the wanted slice)."""

    piece: int
    source: TensorSlice
    target: TensorSlice


def plan_reads(name: str, pieces: Sequence[TensorSlice], wanted: TensorSlice) -> tuple[Read, ...]:
    """Which of `pieces` fill `wanted`, each with where its part comes from and where it goes.

    Pieces may repeat: what an earlier piece already fills is not read again. Raises CheckpointError that
    names the tensor and the first hole when the pieces leave a part of `wanted` open.
    """
    reads: list[Read] = []
    open_parts = [wanted] if wanted.num_elements else []
    for number, piece in enumerate(pieces):
        if not open_parts:
            break
        shared = piece.intersection(wanted)
        if shared is None or all(part.intersection(shared) is None for part in open_parts):
            continue
        reads.append(Read(piece=number, source=shared.relative_to(piece), target=shared.relative_to(wanted)))
        open_parts = [rest for part in open_parts for rest in _subtract(part, shared)]
    if open_parts:
        raise CheckpointError(
            f"every element that is read must have been saved, but of {name} {wanted} the part "
            f"{open_parts[0]} is in none of the {len(pieces)} saved pieces; save the missing slice, or load "
            "another checkpoint"
        )
    return tuple(reads)


def first_hole(wanted: TensorSlice, pieces: Iterable[TensorSlice]) -> TensorSlice | None:
    """A part of `wanted` that no piece covers, or None when they cover it."""
    open_parts = [wanted] if wanted.num_elements else []
    # In order of their offsets, the open rest of a grid stays a few boxes instead of many.
    for piece in sorted(pieces, key=lambda piece: piece.offsets):
        open_parts = [rest for part in open_parts for rest in _subtract(part, piece)]
    return open_parts[0] if open_parts else None


def check_cover(name: str, global_shape: Sequence[int], slices: Iterable[TensorSlice]) -> None:
    """Check that slices tile a tensor: inside its shape, no hole, and no overlap but exact repetition.

    Raises CheckpointError that names the tensor and the hole, the overlap or the slice outside.
    """
    distinct = tuple(dict.fromkeys(each for each in slices if each.num_elements))
    for each in distinct:
        if not each.is_inside(global_shape):
            raise CheckpointError(
                f"slices must lie inside their tensor, but {each} of {name} leaves its shape "
                f"{tuple(global_shape)}; correct the offsets and sizes, or the global shape"
            )
    hole = first_hole(TensorSlice.whole(global_shape), distinct)
    if hole is not None:
        raise CheckpointError(
            f"the slices of a tensor must cover it, but {hole} of {name} with shape {tuple(global_shape)} is "
            f"in none of its {len(distinct)} slices; give the slice that holds it"
        )
    if sum(each.num_elements for each in distinct) != math.prod(global_shape):
        first, second = _overlapping_pair(distinct)
        raise CheckpointError(
            f"slices of a tensor are equal or apart, but {first} and {second} of {name} share a part; "
            "cut them so that every element is in one slice (replicas give the same slice)"
        )


@dataclass(frozen=True, kw_only=True)
class HeldTensor:
    """One tensor and who holds which slice of it; several ranks may hold the same slice (replicas)."""

    global_shape: tuple[int, ...]
    dtype: str
    holders: tuple[tuple[int, TensorSlice], ...]


@dataclass(frozen=True, kw_only=True)
class SliceTable:
    """Name -> tensor and its holders, for all ranks. CheckpointError unless each is covered exactly."""

    tensors: Mapping[str, HeldTensor]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            check_cover(name, tensor.global_shape, (held for _, held in tensor.holders))

    def written_by(self, rank: int) -> tuple[tuple[str, TensorSlice], ...]:
        """What this rank writes: of every slice it holds, those of which it is the lowest holder."""
        written: list[tuple[str, TensorSlice]] = []
        for name, tensor in self.tensors.items():
            lowest: dict[TensorSlice, int] = {}
            for holder, held in tensor.holders:
                lowest[held] = min(holder, lowest.get(held, holder))
            written.extend((name, held) for held, writer in lowest.items() if writer == rank)
        return tuple(written)


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> tuple[TensorSlice, ...]:
    """The elements start <= i < stop of a tensor in row-major order, as boxes in that order: at most 2 n - 1 of n dims.

    Each box is a run of its own, so that it is a view of the flat elements.

        shape (4, 3), 2 .. 10      . . #        box 1
                                   # # #        box 2
                                   # # #
                                   # . .        box 3

    Raises CheckpointError where the run leaves the tensor.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise CheckpointError(
            f"a run of elements lies inside its tensor, but {start} .. {stop} leaves the {math.prod(shape)} of shape "
            f"{tuple(shape)}; correct it"
        )
    if start == stop:
        return ()
    if len(shape) < 2:
        return (TensorSlice(offsets=(start,) * len(shape), sizes=(stop - start,) * len(shape)),)
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _in_row(first, boxes_of_run(shape[1:], start - first * row, stop - first * row))
    head, tail = start - first * row, stop - last * row  # from where row `first`, and up to where row `last` is in it
    whole_from, whole_to = first + (head > 0), last + (tail == row)
    boxes = _in_row(first, boxes_of_run(shape[1:], head, row)) if head else ()
    if whole_from < whole_to:
        offsets = (whole_from, *(0 for _ in shape[1:]))
        boxes = (*boxes, TensorSlice(offsets=offsets, sizes=(whole_to - whole_from, *shape[1:])))
    if tail < row:
        boxes = (*boxes, *_in_row(last, boxes_of_run(shape[1:], 0, tail)))
    return boxes


def _in_row(index: int, boxes: tuple[TensorSlice, ...]) -> tuple[TensorSlice, ...]:
    """Boxes of one row of a tensor, as boxes of the tensor."""
    return tuple(TensorSlice(offsets=(index, *box.offsets), sizes=(1, *box.sizes)) for box in boxes)


def _subtract(box: TensorSlice, cut: TensorSlice) -> list[TensorSlice]:
    """What is left of `box` without `cut`, as boxes that do not overlap: at most two for each dim."""
    shared = box.intersection(cut)
    if shared is None:
        return [box]
    rest: list[TensorSlice] = []
    offsets, sizes = list(box.offsets), list(box.sizes)
    for dim, (start, stop) in enumerate(zip(shared.offsets, shared.stops, strict=True)):
        end = offsets[dim] + sizes[dim]
        for low, high in ((offsets[dim], start), (stop, end)):
            if low < high:
                side_offsets, side_sizes = (*offsets[:dim], low), (*sizes[:dim], high - low)
                rest.append(
                    TensorSlice(offsets=(*side_offsets, *offsets[dim + 1 :]), sizes=(*side_sizes, *sizes[dim + 1 :]))
                )
        offsets[dim], sizes[dim] = start, stop - start  # the next dims split only what is level with the cut
    return rest


def _overlapping_pair(slices: Sequence[TensorSlice]) -> tuple[TensorSlice, TensorSlice]:
    for number, first in enumerate(slices):
        for second in slices[:number]:
            if first.intersection(second) is not None:
                return second, first
    raise AssertionError("called only for slices whose elements sum to more than their tensor")
