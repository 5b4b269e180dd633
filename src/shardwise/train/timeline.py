"""Records what all ranks did in a step, on one clock, beside what was predicted. Collective; rank 0 gets the recording.

Knows the moments of each rank and how to bring them together; refuses to know which steps are worth it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from shardwise.comm.clock import ClockOffset, clock_offsets
from shardwise.execute.place import Place
from shardwise.execute.program import StepResult
from shardwise.schedule import Schedule, Span, Timeline, parse
from shardwise.schedule.recording import Recording

__all__ = ["pipelines", "record"]

Row = Sequence[tuple[str, float, float]]  # of one rank: action, and when it computed by the rank's own clock


def record(
    result: StepResult,
    *,
    step: int,
    place: Place,
    layout: str,
    schedule: Schedule,
    planned: Timeline | None = None,
    device: torch.device | str = "cpu",
) -> Recording | None:
    """The recording of a step on rank 0, None on the others. Every rank calls it behind that step."""
    mine = [(str(moment.action), moment.ready_s, moment.end_s) for moment in result.moments]
    told: list[tuple[Row, float]] = [(mine, result.sums_s)]
    offsets = clock_offsets(place.rank, place.world_size, device=device)
    if place.world_size > 1:
        gathered = [told[0]] * place.world_size
        dist.gather_object(told[0], gathered if place.rank == 0 else None, dst=0)
        told = gathered
    if place.rank != 0:
        return None
    return Recording(
        step=step,
        layout=layout,
        schedule=schedule,
        edges=result.edges,
        measured=pipelines([row for row, _ in told], offsets, place),
        sums_s=max(sums_s for _, sums_s in told),
        planned=planned,
        clock_error_s=sum(sorted(offset.error_s for offset in offsets)[-2:]),  # of the two that are known worst
    )


def pipelines(rows: Sequence[Row], offsets: Sequence[ClockOffset], place: Place) -> tuple[Timeline, ...]:
    """The timelines of all replicas and shards, from what every rank of the world did by its own clock.

    Seconds count from the first start of any rank, by the clock of rank 0.
    """
    shifted = [
        [(action, start_s - offset.offset_s, end_s - offset.offset_s) for action, start_s, end_s in row]
        for row, offset in zip(rows, offsets, strict=True)
    ]
    first_s = min((start_s for row in shifted for _, start_s, _ in row), default=0.0)
    return tuple(
        Timeline(
            num_ranks=place.pp,
            spans=tuple(
                Span(rank=position, action=parse(action), start_s=start_s - first_s, end_s=end_s - first_s)
                for position, rank in enumerate(dataclasses.replace(place, rank=first).pipeline())
                for action, start_s, end_s in shifted[rank]
            ),
        )
        for first in range(place.dp * place.cp * place.tp)  # the ranks at position 0
    )
