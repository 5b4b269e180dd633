"""Which rank sends which part of a tensor to whom, when every rank is to hold other slices of it than it does.

    held                wanted              moves
    rank 0  [0:2, :]    rank 0  [:, 0:2]    0 -> 0 [0:2, 0:2], 1 -> 0 [2:4, 0:2]
    rank 1  [2:4, :]    rank 1  [:, 2:4]    0 -> 1 [0:2, 2:4], 1 -> 1 [2:4, 2:4]

What a checkpoint does with files, with ranks in their place: the same boxes, the same rule that every element has been
held by somebody. What a rank has itself it takes from itself; replicas are asked in turn. Knows offsets and sizes;
refuses to know torch, layouts and how anything travels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from shardwise.checkpoint.slices import TensorSlice, plan_reads

__all__ = ["Move", "plan_moves"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A box that rank `source` has in its piece number `piece`, for the slice number `wanted` of rank `target`.

    `taken` is counted inside the piece, `put` inside the wanted slice; both have the same sizes.
    """

    source: int
    target: int
    piece: int
    wanted: int
    taken: TensorSlice
    put: TensorSlice

    @property
    def num_elements(self) -> int:
        return self.taken.num_elements

    def in_parts(self, most: int) -> Iterator[Move]:
        """The same in moves of at most `most` elements (at least one each), in row-major order."""
        sizes = self.taken.sizes
        dim = next((dim for dim, size in enumerate(sizes) if size > 1), None)
        if self.num_elements <= most or dim is None:
            yield self
            return
        rows = max(1, most // math.prod(sizes[dim + 1 :]))
        for start in range(0, sizes[dim], rows):
            count = min(rows, sizes[dim] - start)
            part = dataclasses.replace(
                self, taken=_rows(self.taken, dim, start, count), put=_rows(self.put, dim, start, count)
            )
            yield from part.in_parts(most)


def plan_moves(
    name: str, held: Sequence[Sequence[TensorSlice]], wanted: Sequence[Sequence[TensorSlice]]
) -> tuple[Move, ...]:
    """The moves that fill all wanted slices of a tensor: `held[rank]` and `wanted[rank]`, the same on every rank.

    Raises CheckpointError with the first hole where nobody holds an element.
    """
    moves: list[Move] = []
    for target, slices in enumerate(wanted):
        if not slices:
            continue
        others = sorted(set(range(len(held))) - {target}, key=lambda rank: (rank + target) % len(held))
        order = [target, *others]  # another one first for every target
        owners = [(source, piece) for source in order for piece in range(len(held[source]))]
        pieces = [held[source][piece] for source, piece in owners]
        for number, region in enumerate(slices):
            for read in plan_reads(name, pieces, region):
                source, piece = owners[read.piece]
                moves.append(
                    Move(source=source, target=target, piece=piece, wanted=number, taken=read.source, put=read.target)
                )
    return tuple(moves)


def _rows(box: TensorSlice, dim: int, start: int, count: int) -> TensorSlice:
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[dim], sizes[dim] = offsets[dim] + start, count
    return TensorSlice(offsets=tuple(offsets), sizes=tuple(sizes))
