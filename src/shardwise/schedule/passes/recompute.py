"""The pass that trades time for memory: a stage keeps only its inputs, and runs its forward again for the backward.

    0F0 0F1 0B0 0B1  ->  0F0 0F1 0C0 0B0 0C1 0B1

C stands right ahead of the backward, so that one micro-batch at most is held whole. It needs nothing from other ranks:
it runs while its backward's gradient is still on the way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, StageAction
from shardwise.schedule.schedule import Schedule

__all__ = ["with_recompute"]


def with_recompute(schedule: Schedule, stages: Collection[int] | None = None) -> Schedule:
    """Adds a C ahead of every B or I of `stages` (all, if not given).

    Raises ScheduleError if a stage is not one of the schedule's, or recomputes already.
    """
    chosen = range(schedule.num_stages) if stages is None else stages
    if unknown := sorted(set(chosen) - set(range(schedule.num_stages))):
        raise ScheduleError(
            f"a schedule of {schedule.num_stages} stages was to recompute stage {unknown[0]}; name stages from 0 to "
            f"{schedule.num_stages - 1}"
        )
    for action in (action for row in schedule.actions for action in row):
        if action.kind is Kind.C and action.stage in chosen:
            raise ScheduleError(f"a forward is computed again once, but {action} stands already; name other stages")
    return replace(schedule, actions=tuple(tuple(_again(row, chosen)) for row in schedule.actions))


def _again(row: tuple[Action | StageAction, ...], stages: Collection[int]) -> Iterator[Action | StageAction]:
    for action in row:
        if isinstance(action, Action) and action.kind in (Kind.B, Kind.I) and action.stage in stages:
            yield replace(action, kind=Kind.C)
        yield action
