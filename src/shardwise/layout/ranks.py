"""Ranks and their coordinates: which place of the pipeline, replica and shard a rank is. Pure arithmetic.

Shards, which exchange the most, are neighbours; then replicas; the pipeline is the outermost axis:

    rank = (position · dp + replica) · tp + shard       dp=2, pp=3, tp=2    position 0   0 1   2 3
                                                                            position 1   4 5   6 7
                                                                            position 2   8 9  10 11
                                                                             replica      0     1

Which stages stand at a position is said by the schedule: stage s at position s where each rank owns one.

With an ep axis there are dp · ep replicas, which hold different experts in turn: replica % ep says which.
"""

from __future__ import annotations

import dataclasses

from shardwise.errors import LayoutError
from shardwise.layout.layout import Layout

__all__ = ["Coordinates", "coordinates", "experts", "pipelines", "position_ranks", "rank_of", "replicas", "shards"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where a rank stands."""

    position: int  # in the pipeline
    replica: int
    shard: int = 0


def coordinates(layout: Layout, rank: int) -> Coordinates:
    """Rank -> position, replica and shard. Raises `LayoutError` for a rank that the layout does not have."""
    _within("rank", rank, layout.world_size, layout)
    rest, shard = divmod(rank, layout.tp)
    position, replica = divmod(rest, layout.num_replicas)
    return Coordinates(position=position, replica=replica, shard=shard)


def rank_of(layout: Layout, *, position: int, replica: int, shard: int = 0) -> int:
    """Position, replica and shard -> rank, the inverse of `coordinates`. Raises `LayoutError` out of range."""
    _within("position", position, layout.pp, layout)
    _within("replica", replica, layout.num_replicas, layout)
    _within("shard", shard, layout.tp, layout)
    return (position * layout.num_replicas + replica) * layout.tp + shard


def position_ranks(layout: Layout, position: int) -> tuple[int, ...]:
    """The ranks at one place of the pipeline, which hold the same stages, by replica and shard."""
    return tuple(
        rank_of(layout, position=position, replica=replica, shard=shard)
        for replica in range(layout.num_replicas)
        for shard in range(layout.tp)
    )


def replicas(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the dp and ep axes: for every position and shard, the ranks that average its gradients."""
    return tuple(
        tuple(
            rank_of(layout, position=position, replica=replica, shard=shard) for replica in range(layout.num_replicas)
        )
        for position in range(layout.pp)
        for shard in range(layout.tp)
    )


def pipelines(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the pp axis: for every replica and shard, its ranks by position."""
    return tuple(
        tuple(rank_of(layout, position=position, replica=replica, shard=shard) for position in range(layout.pp))
        for replica in range(layout.num_replicas)
        for shard in range(layout.tp)
    )


def shards(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the tp axis: for every position and replica, the ranks that divide its units."""
    return tuple(
        tuple(rank_of(layout, position=position, replica=replica, shard=shard) for shard in range(layout.tp))
        for position in range(layout.pp)
        for replica in range(layout.num_replicas)
    )


def experts(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the ep axis: for every position, replica of all experts and shard, the ranks that divide them."""
    return tuple(
        tuple(
            rank_of(layout, position=position, replica=outer * layout.ep + each, shard=shard)
            for each in range(layout.ep)
        )
        for position in range(layout.pp)
        for outer in range(layout.dp)
        for shard in range(layout.tp)
    )


def _within(what: str, index: int, size: int, layout: Layout) -> None:
    if not 0 <= index < size:
        raise LayoutError(f"{layout} has {what}s 0 to {size - 1}, but got {what} {index}; use one of these")
