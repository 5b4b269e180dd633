"""Ranks and their coordinates: which stage, replica and shard a rank is. Pure arithmetic.

The shards of a stage, which exchange the most, are neighbours; then its replicas; the pipeline is the outermost axis:

    rank = (stage · dp + replica) · tp + shard          dp=2, pp=3, tp=2    stage 0   0 1   2 3
                                                                            stage 1   4 5   6 7
                                                                            stage 2   8 9  10 11
                                                                          replica      0     1

With an ep axis there are dp · ep replicas, which hold different experts in turn: replica % ep says which.
"""

from __future__ import annotations

import dataclasses

from shardwise.errors import LayoutError
from shardwise.layout.layout import Layout

__all__ = ["Coordinates", "coordinates", "experts", "pipelines", "rank_of", "replicas", "shards", "stage_ranks"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where a rank stands."""

    stage: int
    replica: int
    shard: int = 0


def coordinates(layout: Layout, rank: int) -> Coordinates:
    """Rank -> stage, replica and shard. Raises `LayoutError` for a rank that the layout does not have."""
    _within("rank", rank, layout.world_size, layout)
    rest, shard = divmod(rank, layout.tp)
    stage, replica = divmod(rest, layout.num_replicas)
    return Coordinates(stage=stage, replica=replica, shard=shard)


def rank_of(layout: Layout, *, stage: int, replica: int, shard: int = 0) -> int:
    """Stage, replica and shard -> rank, the inverse of `coordinates`. Raises `LayoutError` out of range."""
    _within("stage", stage, layout.pp, layout)
    _within("replica", replica, layout.num_replicas, layout)
    _within("shard", shard, layout.tp, layout)
    return (stage * layout.num_replicas + replica) * layout.tp + shard


def stage_ranks(layout: Layout, stage: int) -> tuple[int, ...]:
    """The ranks that hold one stage, by replica and shard."""
    return tuple(
        rank_of(layout, stage=stage, replica=replica, shard=shard)
        for replica in range(layout.num_replicas)
        for shard in range(layout.tp)
    )


def replicas(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the dp and ep axes: for every stage and shard, the ranks that average its gradients."""
    return tuple(
        tuple(rank_of(layout, stage=stage, replica=replica, shard=shard) for replica in range(layout.num_replicas))
        for stage in range(layout.pp)
        for shard in range(layout.tp)
    )


def pipelines(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the pp axis: for every replica and shard, its ranks by stage."""
    return tuple(
        tuple(rank_of(layout, stage=stage, replica=replica, shard=shard) for stage in range(layout.pp))
        for replica in range(layout.num_replicas)
        for shard in range(layout.tp)
    )


def shards(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the tp axis: for every stage and replica, the ranks that divide its units."""
    return tuple(
        tuple(rank_of(layout, stage=stage, replica=replica, shard=shard) for shard in range(layout.tp))
        for stage in range(layout.pp)
        for replica in range(layout.num_replicas)
    )


def experts(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the ep axis: for every stage, replica of all experts and shard, the ranks that divide them."""
    return tuple(
        tuple(rank_of(layout, stage=stage, replica=outer * layout.ep + each, shard=shard) for each in range(layout.ep))
        for stage in range(layout.pp)
        for outer in range(layout.dp)
        for shard in range(layout.tp)
    )


def _within(what: str, index: int, size: int, layout: Layout) -> None:
    if not 0 <= index < size:
        raise LayoutError(f"{layout} has {what}s 0 to {size - 1}, but got {what} {index}; use one of these")
