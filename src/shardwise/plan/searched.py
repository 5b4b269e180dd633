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
from shardwise.schedule.search_placements import search_placements

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
            text += f"{gain:.1%} less than the best textbook one ({name}, {format_seconds(textbook_s)}); "
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

    With one stage a rank only the order is searched, with more also which rank owns which stages: as generators place
    them (a loop, a V) or in any other way. A rank holds at most what the fullest rank of a loop or V holds with 2 * pp
    micro-batches in flight, twice as many as 1F1B has on its first rank. Raises `ScheduleError` where stages are not
    numbered in the order of the dataflow.
    """
    cut = cut_stages(profile.flow, stages, layout.num_stages)
    priced = stage_estimates(profile, cut, flops_per_s=flops_per_s)
    costs = costs_of(priced, edge_estimates(profile, cut), bytes_per_s=bytes_per_s)
    chunks = layout.num_stages // layout.pp
    ways = [stages_of_ranks(way, num_ranks=layout.pp, chunks=chunks) for way in Placement]
    edges = frozenset(cut.edges)
    if chunks == 1:
        most = max(stage.micro_batch_bytes for stage in priced)
        memory = memory_of(priced, (2.0 * layout.pp * most,) * layout.pp)
        best = search(
            costs, num_micro_batches=num_micro_batches, ranks=ways[0], edges=edges, memory=memory, seconds=seconds
        )
    else:
        held = [stage.memory_bytes - stage.activation_bytes for stage in priced]
        full = [held[stage.stage] + 2 * layout.pp * stage.micro_batch_bytes for stage in priced]
        limit = float(max(sum(full[stage] for stage in own) for ranks in ways for own in ranks))
        best = search_placements(
            costs,
            num_micro_batches=num_micro_batches,
            num_ranks=layout.pp,
            edges=edges,
            memory=memory_of(priced, (limit,) * layout.pp),
            held_bytes=held,
            seconds=seconds,
        )
    return Found(searched=best, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s)
