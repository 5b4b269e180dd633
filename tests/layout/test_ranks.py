"""Ranks and coordinates are each other's inverse, and the groups of an axis cover every rank once."""

from __future__ import annotations

import pytest

from shardwise.errors import LayoutError
from shardwise.layout import (
    Coordinates,
    Layout,
    contexts,
    coordinates,
    experts,
    pipelines,
    position_ranks,
    rank_of,
    replicas,
    shards,
    states,
)
from shardwise.layout.rules import check_world_size

LAYOUT = Layout(dp=2, pp=3)


def test_the_ranks_of_a_position_are_neighbours() -> None:
    assert replicas(LAYOUT) == ((0, 1), (2, 3), (4, 5))
    assert pipelines(LAYOUT) == ((0, 2, 4), (1, 3, 5))
    assert position_ranks(LAYOUT, 1) == (2, 3)
    assert coordinates(LAYOUT, 3) == Coordinates(position=1, replica=1)


def test_the_shards_of_a_position_are_closer_than_its_replicas() -> None:
    layout = Layout(dp=2, pp=2, tp=2)
    assert shards(layout) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert replicas(layout) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert pipelines(layout) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert position_ranks(layout, 1) == (4, 5, 6, 7)
    assert coordinates(layout, 6) == Coordinates(position=1, replica=1, shard=0)
    assert rank_of(layout, position=1, replica=0, shard=1) == 5


def test_rank_and_coordinates_are_inverse() -> None:
    for rank in range(LAYOUT.world_size):
        here = coordinates(LAYOUT, rank)
        assert rank_of(LAYOUT, position=here.position, replica=here.replica) == rank


@pytest.mark.parametrize("axes", [replicas, pipelines])
def test_the_groups_of_an_axis_hold_every_rank_once(axes) -> None:
    assert sorted(rank for group in axes(LAYOUT) for rank in group) == list(range(6))


def test_a_rank_outside_the_layout_is_refused() -> None:
    with pytest.raises(LayoutError, match="ranks 0 to 5, but got rank 6"):
        coordinates(LAYOUT, 6)
    with pytest.raises(LayoutError, match="positions 0 to 2"):
        rank_of(LAYOUT, position=3, replica=0)


def test_a_world_of_another_size_is_refused_with_the_layouts_that_fit() -> None:
    check_world_size(dp=2, pp=2, world_size=4)
    with pytest.raises(LayoutError, match="2 × 3 = 6 and there are 4; use dp=4,pp=1 or dp=2,pp=2 or dp=1,pp=4"):
        check_world_size(dp=2, pp=3, world_size=4)
    with pytest.raises(LayoutError, match="2 × 3 × 2 = 12 and there are 4; start 12 ranks"):
        check_world_size(dp=2, pp=3, tp=2, world_size=4)


def test_every_axis_has_groups_of_all_ranks() -> None:
    layout = Layout(dp=2, fsdp=2, ep=2, pp=2, cp=2, tp=2)
    sizes = {replicas: 8, pipelines: 2, shards: 2, contexts: 2, experts: 2, states: 2}
    for groups_of, size in sizes.items():
        groups = groups_of(layout)
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(64))
    assert states(layout)[0] == (0, 8)  # replicas 0 and 2, four ranks each: experts and sequences lie between
