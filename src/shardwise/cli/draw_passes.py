"""What a command line adds to a schedule: the passes of `schedule.passes` with their times. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardwise.schedule import Costs, Kind, Schedule, StageKind
from shardwise.schedule.passes import with_offload, with_recompute, with_reductions

__all__ = ["with_passes"]


def with_passes(
    schedule: Schedule,
    costs: Costs,
    *,
    recompute: bool = False,
    offload: float | None = None,
    reduce: float | None = None,
) -> tuple[Schedule, Costs]:
    """The schedule and its costs with forwards run again, activations moved to the host and gradients summed.

    `offload` is the time of one way of one micro-batch, `reduce` that of the sum of a stage; None: not done.
    """
    beside: Mapping[Kind | StageKind, tuple[float, ...]] = dict(costs.beside_seconds)
    if reduce is not None:
        schedule = with_reductions(schedule)
        beside = {**beside, StageKind.G: (reduce,) * schedule.num_stages}
    if recompute:
        schedule = with_recompute(schedule)
    if offload is not None:
        schedule = with_offload(schedule)
        beside = {**beside, Kind.O: (offload,) * schedule.num_stages, Kind.L: (offload,) * schedule.num_stages}
    return schedule, replace(costs, beside_seconds=beside)
