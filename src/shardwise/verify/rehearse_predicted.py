"""What the planner says of the rank that is rehearsed: its bytes line by line, what it sends, its seconds.

The same functions that price layouts for the search, of the same traced profiles. Refuses to know what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shardwise.describe.cluster import Cluster
from shardwise.execute.place import Place, owners_of
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.layout import Layout
from shardwise.plan.cut import cut_stages
from shardwise.plan.job import Job
from shardwise.plan.lines import MemoryLines, TimeLines
from shardwise.plan.memory import memory_lines
from shardwise.plan.partition import place as place_calls
from shardwise.plan.price import in_flight_of, price
from shardwise.plan.sources import source_of
from shardwise.plan.step_traffic import traffic_of_step
from shardwise.train.estimate import summed_parameters

__all__ = ["Foretold", "foretell"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foretold:
    """Of one rank and step. lines: of tensors alone; time, step_s: None where no cluster was given."""

    lines: MemoryLines
    sent_bytes: Mapping[str, int]
    time: TimeLines | None = None
    step_s: float | None = None


def foretell(
    profiles: TracedProfiles,
    layout: Layout,
    job: Job,
    *,
    rank: int,
    samples: int,
    num_micro_batches: int,
    cluster: Cluster | None = None,
) -> Foretold:
    """What is predicted of rank `rank`. samples: of a micro-batch. Raises what tracing and prices raise."""
    works = profiles.works(layout, samples, num_micro_batches=num_micro_batches)
    source = source_of(layout)
    assert source is not None  # a schedule that is searched is not rehearsed
    ranks = source.ranks
    at = Place(
        rank=rank, dp=layout.num_replicas, pp=layout.pp, tp=layout.tp, cp=layout.cp, owner_of=owners_of(ranks)
    ).position
    alive = in_flight_of(works, layout, num_micro_batches)
    lines = memory_lines(
        [works[stage] for stage in ranks[at]],
        layout,
        job,
        num_micro_batches=num_micro_batches,
        in_flight=[alive[stage] for stage in ranks[at]],
    )
    whole, shard = profiles.whole(samples), profiles.shard(layout, samples)
    traffic = traffic_of_step(
        works,
        ranks,
        summed_parameters(
            shard,
            cut_stages(whole.flow, place_calls(whole, layout), layout.num_stages),
            profiles.tensor_plan(layout.tp, layout.sequence_parallel) if layout.tp > 1 else None,
            frozenset(profiles.expert_plan(layout.ep).slices()) if layout.ep > 1 else frozenset(),
        ),
        layout,
        job,
        num_micro_batches=num_micro_batches,
    )
    told = None if cluster is None else price(works, layout, cluster, job, num_micro_batches=num_micro_batches)
    return Foretold(
        lines=dataclasses.replace(lines, framework=0.0, slack=0.0),
        sent_bytes=traffic[at],
        time=None if told is None else told.time[at],
        step_s=None if told is None else told.step_s,
    )
