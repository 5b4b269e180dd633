"""Costs read off a timeline: what actions and transfers of a real step took, so that the simulator can run it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median

from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edge, Edges
from shardwise.schedule.produced import Produced
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.timeline import Span, Timeline

__all__ = ["measured_costs"]


def measured_costs(timeline: Timeline, schedule: Schedule, edges: Edges) -> Costs:
    """The median seconds of each kind of action on each stage, and of each edge between two ranks.

    A transfer shows where its receiver had nothing else to do when the value was made: from there to the start of who
    reads it. An edge on which nobody ever waited so costs nothing that could be seen: 0 s.
    """
    produced = Produced(timeline, edges)
    spans = [(span, a) for span in timeline.spans if isinstance(a := span.action, Action) and a.kind.computes]
    seconds: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for span, action in spans:
        seconds[action.kind, action.stage].append(span.end_s - span.start_s)
    kinds = sorted({kind for kind, _ in seconds})
    stages = range(schedule.num_stages)
    compute = {kind: tuple(median(seconds.get((kind, s), [0.0])) for s in stages) for kind in kinds}
    owners = schedule.owners
    crossing = {(s, t) for s, t in edges if owners[s] != owners[t]}
    forward, back = _transfers(timeline, spans, produced)
    return Costs(
        compute_seconds=compute,
        activation_seconds={edge: median(forward.get(edge, [0.0])) for edge in crossing},
        gradient_seconds={edge: median(back.get(edge, [0.0])) for edge in crossing},
    )


def _transfers(
    timeline: Timeline, spans: list[tuple[Span, Action]], produced: Produced
) -> tuple[Mapping[Edge, list[float]], Mapping[Edge, list[float]]]:
    """Of activations and gradients, the seconds that their readers waited for them and for nothing else."""
    forward: dict[Edge, list[float]] = defaultdict(list)
    back: dict[Edge, list[float]] = defaultdict(list)
    free_s = [timeline.start_s] * timeline.num_ranks
    for span, action in sorted(spans, key=lambda item: item[0].start_s):
        others = [each for each in produced.inputs(action) if each.rank != span.rank]
        last = max(others, key=lambda each: each.end_s, default=None)
        if last is not None and last.end_s >= free_s[span.rank] and isinstance(last.action, Action):
            here, there = action.stage, last.action.stage
            edge = (min(here, there), max(here, there))
            (forward if there < here else back)[edge].append(max(span.start_s - last.end_s, 0.0))
        free_s[span.rank] = span.end_s
    return forward, back
