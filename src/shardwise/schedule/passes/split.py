"""The pass that splits whole backwards into their halves, and the one that joins halves that stand side by side.

    0F0 0B0  ->  0F0 0I0 0W0        0F0 0F1 0I0 0I1 0W1 0W0  ->  0F0 0F1 0I0 0B1 0W0

Neither moves anything: to place the weight gradients elsewhere is the business of a generator or of the search.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from shardwise.schedule.actions import Action, Kind, StageAction
from shardwise.schedule.schedule import Schedule

__all__ = ["merge_backwards", "split_backwards"]

Items = tuple[Action | StageAction, ...]


def split_backwards(schedule: Schedule, stages: Collection[int] | None = None) -> Schedule:
    """Writes every B of `stages` (all, if not given) as I and W; gradients leave after the first half."""
    chosen = _all_or(stages, schedule)
    return replace(schedule, actions=tuple(tuple(_split(row, chosen)) for row in schedule.actions))


def merge_backwards(schedule: Schedule, stages: Collection[int] | None = None) -> Schedule:
    """Writes every I of `stages` (all, if not given) that is followed by its own W as B.

    For stages that cannot be split, and where nobody waits for the first half.
    """
    chosen = _all_or(stages, schedule)
    return replace(schedule, actions=tuple(tuple(_merged(row, chosen)) for row in schedule.actions))


def _all_or(stages: Collection[int] | None, schedule: Schedule) -> Collection[int]:
    return range(schedule.num_stages) if stages is None else stages


def _split(row: Items, stages: Collection[int]) -> Iterator[Action | StageAction]:
    for action in row:
        if isinstance(action, Action) and action.kind is Kind.B and action.stage in stages:
            yield replace(action, kind=Kind.I)
            yield replace(action, kind=Kind.W)
        else:
            yield action


def _merged(row: Items, stages: Collection[int]) -> Iterator[Action | StageAction]:
    skipped = False
    for index, action in enumerate(row):
        if skipped:
            skipped = False
        elif isinstance(action, Action) and action.kind is Kind.I and action.stage in stages:
            skipped = row[index + 1 : index + 2] == (replace(action, kind=Kind.W),)
            yield replace(action, kind=Kind.B) if skipped else action
        else:
            yield action
