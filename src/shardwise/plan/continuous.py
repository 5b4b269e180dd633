"""What changes in an estimate where steps follow one another without a flush (see `schedule.pipedream_2bw`).

Arithmetic on an estimate of one step by itself. Knows neither models nor layouts.
"""

from __future__ import annotations

from shardwise.schedule import Costs, Edges, Schedule, simulate
from shardwise.schedule.pipedream_2bw import unrolled

__all__ = ["NOTE", "VERSIONS", "further_step_s"]

VERSIONS = 2  # of trained weights, and steps' gradients, that a rank holds
NOTE = "a step follows another without a flush, its gradients are one step late (docs/asynchronous.md)"


def further_step_s(schedule: Schedule, edges: Edges, costs: Costs) -> float:
    """Seconds that one more step takes where several are under way. Raises ScheduleError for too few micro-batches."""
    num_ranks, num_micro_batches = schedule.num_ranks, schedule.num_micro_batches
    fewer, more = (
        simulate(
            unrolled(num_ranks=num_ranks, num_micro_batches=num_micro_batches, num_steps=num_steps), edges, costs=costs
        ).seconds
        for num_steps in (3, 4)
    )
    return more - fewer
