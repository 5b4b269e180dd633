"""Ranks and their coordinates: which stage and which replica a rank is. Pure arithmetic.

The pipeline is the outermost axis, so that the ranks of one stage, which exchange the most, are neighbours:

    rank = stage · dp + replica          dp=2, pp=3      stage 0  0 1
                                                         stage 1  2 3
                                                         stage 2  4 5
                                                       replica    0 1
"""

from __future__ import annotations

import dataclasses

from shardwise.errors import LayoutError
from shardwise.layout.layout import Layout

__all__ = ["Coordinates", "coordinates", "pipelines", "rank_of", "replicas", "stage_ranks"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where a rank stands."""

    stage: int
    replica: int


def coordinates(layout: Layout, rank: int) -> Coordinates:
    """Rank -> stage and replica. Raises `LayoutError` for a rank that the layout does not have."""
    _within("rank", rank, layout.world_size, layout)
    stage, replica = divmod(rank, layout.dp)
    return Coordinates(stage=stage, replica=replica)


def rank_of(layout: Layout, *, stage: int, replica: int) -> int:
    """Stage and replica -> rank, the inverse of `coordinates`. Raises `LayoutError` out of range."""
    _within("stage", stage, layout.pp, layout)
    _within("replica", replica, layout.dp, layout)
    return stage * layout.dp + replica


def stage_ranks(layout: Layout, stage: int) -> tuple[int, ...]:
    """The ranks that hold one stage, by replica."""
    return tuple(rank_of(layout, stage=stage, replica=replica) for replica in range(layout.dp))


def replicas(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the dp axis: for every stage, the ranks that average its gradients."""
    return tuple(stage_ranks(layout, stage) for stage in range(layout.pp))


def pipelines(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The groups of the pp axis: for every replica, its ranks by stage."""
    return tuple(
        tuple(rank_of(layout, stage=stage, replica=replica) for stage in range(layout.pp))
        for replica in range(layout.dp)
    )


def _within(what: str, index: int, size: int, layout: Layout) -> None:
    if not 0 <= index < size:
        raise LayoutError(f"{layout} has {what}s 0 to {size - 1}, but got {what} {index}; use one of these")
