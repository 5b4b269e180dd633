"""The schedule that is searched for a model: from its profile to what the search needs, over the ways to place stages.

Knows profiles and layouts; how a schedule is found is the business of `schedule.search`, that it is agreed on is the
business of whoever has ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shardwise.describe.profile import ModelProfile
from shardwise.layout import Layout
from shardwise.plan.cut import cut_stages
from shardwise.plan.estimate import costs_of, edge_estimates, memory_of, stage_estimates
from shardwise.quantities import format_seconds
from shardwise.schedule import Placement, Schedule
from shardwise.schedule.placement import stages_of_ranks
from shardwise.schedule.search import Searched, search

__all__ = ["Found", "find_schedule"]

SECONDS = 10.0  # of the search, at most
FLOPS_PER_S = 1e11  # of a rank, and bytes a second of a link, where nobody has measured: only their ratio matters
BYTES_PER_S = 4e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A schedule that was searched for, with what the search says of it."""

    searched: Searched
    flops_per_s: float  # of a rank; unused where the profile was measured
    bytes_per_s: float  # of a link

    @property
    def schedule(self) -> Schedule:
        return self.searched.schedule

    def __str__(self) -> str:
        """One line for a plan."""
        found = self.searched
        text = f"searched: {format_seconds(found.seconds)} predicted, "
        if found.best_textbook is not None:
            name, textbook_s = found.best_textbook
            gain = 1 - found.seconds / textbook_s if textbook_s else 0.0
            text += (
                f"{gain:.1%} less than the best textbook one ({name}, {format_seconds(textbook_s)}); "
            )
        return f"{text}none of these stages can take less than {format_seconds(found.lower_bound_s)}"


def find_schedule(
    profile: ModelProfile,
    layout: Layout,
    stages: Mapping[int, int],
    *,
    num_micro_batches: int,
    flops_per_s: float = FLOPS_PER_S,
    bytes_per_s: float = BYTES_PER_S,
    seconds: float = SECONDS,
) -> Found:
    """The best schedule found for `num_micro_batches` a replica in about `seconds`; `stages` is call node -> stage.

    Stages are placed on ranks in a loop and, where each rank has two, as a V; the better one is taken. A rank keeps at
    most twice the activations that 1F1B keeps on its first rank: 2 * pp micro-batches of all stages of the fullest
    rank. Raises `ScheduleError` where stages are not numbered in the order of the dataflow.
    """
    cut = cut_stages(profile.flow, stages, layout.num_stages)
    priced = stage_estimates(profile, cut, flops_per_s=flops_per_s)
    costs = costs_of(priced, edge_estimates(profile, cut), bytes_per_s=bytes_per_s)
    chunks = layout.num_stages // layout.pp
    found: list[Searched] = []
    ways = [Placement.LOOP, Placement.V] if chunks == 2 and layout.pp > 1 else [Placement.LOOP]
    for way in ways:
        ranks = stages_of_ranks(way, num_ranks=layout.pp, chunks=chunks)
        most = max(sum(priced[stage].micro_batch_bytes for stage in own) for own in ranks)
        found.append(
            search(
                costs,
                num_micro_batches=num_micro_batches,
                ranks=ranks,
                edges=frozenset(cut.edges),
                memory=memory_of(priced, (2.0 * layout.pp * most,) * layout.pp),
                seconds=seconds / len(ways),
            )
        )
    best = min(found, key=lambda each: each.seconds)
    return Found(searched=best, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s)
