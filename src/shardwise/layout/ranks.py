"""Ranks and their coordinates: which place of the pipeline, replica and shard a rank is. Pure arithmetic.

Shards, which exchange the most, are neighbours; then the ranks that divide a sequence, then replicas; the pipeline is
the outermost axis:

    rank = ((position · replicas + replica) · cp + context) · tp + shard

    dp=2, pp=3, tp=2    position 0   0 1   2 3
                        position 1   4 5   6 7
                        position 2   8 9  10 11
                         replica      0     1

Which stages stand at a position is said by the schedule: stage s at position s where each rank owns one.

There are dp · fsdp · ep replicas: replica = (outer · fsdp + part) · ep + expert. Those that differ in `part` alone
divide the state of training, those that differ in `expert` alone the experts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from shardwise.errors import LayoutError
from shardwise.layout.layout import Layout

__all__ = [
    "Coordinates",
    "contexts",
    "coordinates",
    "experts",
    "pipelines",
    "position_ranks",
    "rank_of",
    "replicas",
    "shards",
    "states",
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where a rank stands."""

    position: int  # in the pipeline
    replica: int
    context: int = 0  # which part of every sequence
    shard: int = 0


def coordinates(layout: Layout, rank: int) -> Coordinates:
    """Rank -> position, replica and shard. Raises `LayoutError` for a rank that the layout does not have."""
    _within("rank", rank, layout.world_size, layout)
    rest, shard = divmod(rank, layout.tp)
    rest, context = divmod(rest, layout.cp)
    position, replica = divmod(rest, layout.num_replicas)
    return Coordinates(position=position, replica=replica, context=context, shard=shard)


def rank_of(layout: Layout, *, position: int, replica: int, context: int = 0, shard: int = 0) -> int:
    """Position, replica, context and shard -> rank, the inverse of `coordinates`. Raises `LayoutError` out of range."""
    _within("position", position, layout.pp, layout)
    _within("replica", replica, layout.num_replicas, layout)
    _within("context", context, layout.cp, layout)
    _within("shard", shard, layout.tp, layout)
    return ((position * layout.num_replicas + replica) * layout.cp + context) * layout.tp + shard


def position_ranks(layout: Layout, position: int) -> tuple[int, ...]:
    """The ranks at one place of the pipeline, which hold the same stages, in order."""
    first = rank_of(layout, position=position, replica=0)
    return tuple(range(first, first + layout.num_replicas * layout.cp * layout.tp))


def replicas(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """For every position, context and shard, the ranks of all replicas, which average its gradients."""
    return _groups(layout, "replica", range(layout.num_replicas))


def pipelines(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the pp axis: for every replica, context and shard, its ranks by position."""
    return _groups(layout, "position", range(layout.pp))


def shards(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the tp axis: for every position, replica and context, the ranks that divide its units."""
    return _groups(layout, "shard", range(layout.tp))


def contexts(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the cp axis: for every position, replica and shard, the ranks that divide its sequences."""
    return _groups(layout, "context", range(layout.cp))


def experts(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the ep axis: for every position, replica of all experts, context and shard, who divides them."""
    return _among_replicas(layout, range(layout.ep), range(0, layout.num_replicas, layout.ep))


def states(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the fsdp axis: for every position, outer replica, expert, context and shard, the ranks that divide
    the state of training."""
    size = layout.fsdp * layout.ep
    firsts = [outer * size + expert for outer in range(layout.dp) for expert in range(layout.ep)]
    return _among_replicas(layout, range(0, size, layout.ep), firsts)


def _groups(layout: Layout, axis: str, along: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The ranks that differ in one coordinate alone, by the other coordinates."""
    sizes = {"position": layout.pp, "replica": layout.num_replicas, "context": layout.cp, "shard": layout.tp}
    others = {name: range(size) for name, size in sizes.items() if name != axis}
    return tuple(
        tuple(rank_of(layout, **{axis: each}, **dict(zip(others, place, strict=True))) for each in along)
        for place in itertools.product(*others.values())
    )


def _among_replicas(layout: Layout, steps: Sequence[int], firsts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(rank_of(layout, position=position, replica=first + step, context=context, shard=shard) for step in steps)
        for position in range(layout.pp)
        for first in firsts
        for context in range(layout.cp)
        for shard in range(layout.tp)
    )


def _within(what: str, index: int, size: int, layout: Layout) -> None:
    if not 0 <= index < size:
        raise LayoutError(f"{layout} has {what}s 0 to {size - 1}, but got {what} {index}; use one of these")
