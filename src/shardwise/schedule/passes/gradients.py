"""The pass that says when a stage reduces its gradients over the replicas of the model: as soon as they are final.

    0F0 2F0 2B0 0B0  ->  0F0 2F0 2B0 2G 0B0 0G        stage 2 reduces while stage 0 computes

A gradient is final behind the last B or W of its stage; a weight that several stages of the rank hold, behind the last
of all of them. Replicas run one schedule, so they reduce in one order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from shardwise.schedule.actions import Action, Kind, StageAction, StageKind
from shardwise.schedule.schedule import Schedule

__all__ = ["with_reductions"]


def with_reductions(schedule: Schedule, shared: Iterable[Collection[int]] = (), *, overlap: bool = True) -> Schedule:
    """Adds a G for every stage, or for none in a schedule without backwards; any that stand there already move.

    `shared`: groups of stages that hold a weight in common; those of one rank reduce together, behind the last of them.
    Without `overlap` all reductions stand at the end of the row.
    """
    groups = [frozenset(group) for group in shared]
    return replace(schedule, actions=tuple(_reduced(row, groups, overlap) for row in schedule.actions))


def _reduced(
    row: tuple[Action | StageAction, ...], shared: list[frozenset[int]], overlap: bool
) -> tuple[Action | StageAction, ...]:
    row = tuple(action for action in row if action.kind is not StageKind.G)
    last = {action.stage: index for index, action in enumerate(row) if action.kind in (Kind.B, Kind.W)}
    final_at: dict[int, list[int]] = {}
    for stage in sorted(last, key=lambda s: (last[s], s)):
        index = max(last[s] for s in _together(stage, shared) if s in last) if overlap else len(row) - 1
        final_at.setdefault(index, []).append(stage)
    return tuple(
        item
        for index, action in enumerate(row)
        for item in (action, *(StageAction(kind=StageKind.G, stage=s) for s in final_at.get(index, ())))
    )


def _together(stage: int, shared: list[frozenset[int]]) -> frozenset[int]:
    """`stage` and all that share a weight with it, or with one of those."""
    found = frozenset({stage})
    while (wider := found.union(*(group for group in shared if group & found))) != found:
        found = wider
    return found
