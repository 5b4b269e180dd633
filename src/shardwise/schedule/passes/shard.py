"""The pass that says when a stage with sharded parameters gathers them (U) and gives them back (H).

    0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1  ->  0U 2U 0F0 0F1 2F0 2F1 2B0 2B1 2H 0B0 0B1 0H            no limit
                                         0U 0F0 0F1 0H 2U 2F0 2F1 2B0 2B1 2H 0U 0B0 0B1 0H      at most one

A stage works in blocks of actions between which it is another one's turn. Ahead of each block the rank holds the stages
of the next blocks, as many as it may; what is not among them is given back first. So with two or more the next stage's
parameters are gathered while this one computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, StageAction, StageKind
from shardwise.schedule.schedule import Schedule

__all__ = ["with_sharding"]

Items = tuple[Action | StageAction, ...]


def with_sharding(
    schedule: Schedule, stages: Collection[int] | None = None, *, most_unsharded: int | None = None
) -> Schedule:
    """Adds U and H for `stages` (all, if not given), at most `most_unsharded` of a rank gathered at a time.

    Without a limit every stage is gathered once a step. Raises ScheduleError if the limit is below 1.
    """
    if most_unsharded is not None and most_unsharded < 1:
        raise ScheduleError(f"a rank gathers 1 stage or more at a time, but most_unsharded={most_unsharded}; use 2")
    chosen = range(schedule.num_stages) if stages is None else stages
    return replace(schedule, actions=tuple(tuple(_sharded(row, chosen, most_unsharded)) for row in schedule.actions))


def _sharded(row: Items, stages: Collection[int], most: int | None) -> Iterator[Action | StageAction]:
    worked_on = [_stage(action, stages) for action in row]
    next_blocks = _next_blocks(worked_on, most)
    gathered: list[int] = []
    for index, action in enumerate(row):
        block = next_blocks.get(index)
        if block is not None:
            for s in [s for s in gathered if s not in block]:
                gathered.remove(s)
                yield StageAction(kind=StageKind.H, stage=s)
            for s in [s for s in block if s not in gathered]:
                gathered.append(s)
                yield StageAction(kind=StageKind.U, stage=s)
        yield action
    yield from (StageAction(kind=StageKind.H, stage=s) for s in gathered)


def _stage(action: Action | StageAction, stages: Collection[int]) -> int | None:
    """The sharded stage that `action` works on."""
    works = isinstance(action, Action) and action.kind.computes and action.stage in stages
    return action.stage if works else None


def _next_blocks(worked_on: list[int | None], most: int | None) -> dict[int, list[int]]:
    """Where a block begins -> the first stages worked on from there on, at most `most`, in their order."""
    begins: list[tuple[int, int]] = []  # (index, stage)
    for index, stage in enumerate(worked_on):
        if stage is not None and (not begins or begins[-1][1] != stage):
            begins.append((index, stage))
    found: dict[int, list[int]] = {}
    ahead: list[int] = []
    for index, stage in reversed(begins):
        ahead = [stage, *(s for s in ahead if s != stage)]
        found[index] = ahead[:most]
    return found
