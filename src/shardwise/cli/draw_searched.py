"""A schedule that is searched for the costs of a command line. Knows how stages may be placed; times nothing."""

from __future__ import annotations

from shardwise.schedule import Costs, Edges, Placement
from shardwise.schedule.memory import Memory
from shardwise.schedule.placement import stages_of_ranks
from shardwise.schedule.search import Searched, search

__all__ = ["SEARCHED", "searched_for"]

SEARCHED = "searched"


def searched_for(
    costs: Costs, *, num_ranks: int, num_micro_batches: int, chunks: int, room: float | None, edges: Edges | None
) -> Searched:
    """The fastest found, stages laid in a loop or, where each rank has two, as a V.

    `room` is what a rank may keep, in micro-batches of its share of the model. Raises ScheduleError if it is less.
    """
    num_stages = num_ranks * chunks
    memory = Memory(
        activation_bytes=(1 / chunks,) * num_stages,
        weight_bytes=(1 / chunks,) * num_stages,
        limit_bytes=(room,) * num_ranks,
    )
    ways = [Placement.LOOP, Placement.V] if chunks == 2 else [Placement.LOOP]
    found = [
        search(
            costs,
            num_micro_batches=num_micro_batches,
            ranks=stages_of_ranks(way, num_ranks=num_ranks, chunks=chunks),
            edges=edges,
            memory=memory,
        )
        for way in ways
    ]
    return min(found, key=lambda each: each.seconds)
