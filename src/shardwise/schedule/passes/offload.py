"""The pass that keeps what forwards leave behind on the host until the backward needs it.

    0F0 0F1 0F2 0B0 0B1 0B2  ->  0F0 0O0 0F1 0O1 0F2 0O2 0L0 0B0 ...        distance 0

Moving takes its own time beside the work, so a load stands `distance` actions ahead of its backward. A micro-batch
whose backward follows too soon for that stays on the device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, StageAction
from shardwise.schedule.schedule import Schedule

__all__ = ["with_offload"]

Items = tuple[Action | StageAction, ...]


def with_offload(schedule: Schedule, stages: Collection[int] | None = None, *, distance: int = 2) -> Schedule:
    """Adds O behind the forwards of `stages` (all, if not given) and L `distance` actions ahead of their use.

    Their use is the backward, or the forward again where there is one. Raises ScheduleError if `distance` is negative.
    """
    if distance < 0:
        raise ScheduleError(f"a load stands 0 or more actions ahead of its use, but distance={distance}; use 2")
    chosen = range(schedule.num_stages) if stages is None else stages
    return replace(schedule, actions=tuple(_offloaded(row, chosen, distance) for row in schedule.actions))


def _offloaded(row: Items, stages: Collection[int], distance: int) -> Items:
    """Loads for one place stand in the order of their uses."""
    forward_at: dict[tuple[int, int], int] = {}
    used: set[tuple[int, int]] = set()
    ahead: dict[int, list[Action]] = {}
    behind: dict[int, Action] = {}
    for index, action in enumerate(row):
        if not isinstance(action, Action) or action.stage not in stages:
            continue
        place = (action.stage, action.micro_batch)
        if action.kind is Kind.F:
            forward_at[place] = index
        elif action.kind in (Kind.C, Kind.B, Kind.I) and place not in used:
            used.add(place)
            if (at := index - distance) > forward_at[place] + 1:  # something runs while it is away
                ahead.setdefault(at, []).append(replace(action, kind=Kind.L))
                behind[forward_at[place]] = replace(action, kind=Kind.O)
    return tuple(
        item
        for index, action in enumerate(row)
        for item in (*ahead.get(index, ()), action, *([behind[index]] if index in behind else []))
    )
