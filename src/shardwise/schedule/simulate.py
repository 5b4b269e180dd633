"""Predicts when every action and transfer of a schedule runs, given what each one costs."""

from __future__ import annotations

from shardwise.schedule.costs import Costs, check_costs
from shardwise.schedule.graph import Edges, checked
from shardwise.schedule.progress import run
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.timeline import Timeline
from shardwise.schedule.transfers import DEFAULT_PREFETCH

__all__ = ["seconds_of", "simulate"]


def simulate(
    schedule: Schedule, edges: Edges | None = None, *, costs: Costs, prefetch: int = DEFAULT_PREFETCH
) -> Timeline:
    """The timeline of one step, from 0 s; `edges` is the chain if not given.

    Ranks compute in order and transfers run beside them: a value travels once it is sent, its receive is
    posted (`prefetch` actions ahead of its consumer) and the link between the two ranks, one in each
    direction, is free. Time and memory grow with the number of actions. Raises ScheduleError if costs are
    missing or ranks deadlock.
    """
    edges = checked(edges, schedule.num_stages)
    check_costs(costs, schedule, edges)
    progress = run(schedule, edges, costs, prefetch=prefetch)
    return Timeline(num_ranks=schedule.num_ranks, spans=progress.spans())


def seconds_of(
    schedule: Schedule, costs: Costs, edges: Edges | None = None, *, prefetch: int = DEFAULT_PREFETCH
) -> float:
    """Only how long the step takes: `simulate(...).seconds` without making a span. Raises ScheduleError as it does."""
    edges = checked(edges, schedule.num_stages)
    check_costs(costs, schedule, edges)
    return run(schedule, edges, costs, prefetch=prefetch).seconds
