"""Proves that what passes add to a row stands where it makes sense: C, O, L, G, U and H.

One function a rule; a row is looked at alone, since none of these concerns another rank's row.
"""

from __future__ import annotations

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, StageAction, StageKind
from shardwise.schedule.schedule import Schedule

__all__ = ["check_extras"]

_BACKWARD = (Kind.B, Kind.I, Kind.W)
# kind -> what of the same stage and micro-batch has been run ahead of it, and what has not yet
_BETWEEN = {
    Kind.C: ((Kind.F,), (Kind.C, Kind.B, Kind.I)),
    Kind.O: ((Kind.F,), (Kind.O, Kind.C, Kind.B, Kind.I)),
    Kind.L: ((Kind.O,), (Kind.L, Kind.C, Kind.B, Kind.I)),
}


def check_extras(schedule: Schedule) -> None:
    """Raises ScheduleError that names the first rank and action that break a rule."""
    for r, row in enumerate(schedule.actions):
        _check_between(r, row)
        _check_reduced_last(r, row)
        _check_unsharded(r, row)


def _check_between(rank: int, row: tuple[Action | StageAction, ...]) -> None:
    """C, O and L behind the forward and ahead of the backward, once, and L whatever O took away."""
    done: dict[tuple[int, int], list[Kind]] = {}
    for action in row:
        if not isinstance(action, Action):
            continue
        before = done.setdefault((action.stage, action.micro_batch), [])
        behind, ahead = _BETWEEN.get(action.kind, ((), ()))
        if any(kind not in before for kind in behind) or any(kind in before for kind in ahead):
            raise ScheduleError(
                f"C, O and L stand once each, behind the forward and ahead of the backward, in the order O, L, C, but "
                f"on rank {rank} {action} stands behind {_text(action, before)}; move or drop it"
            )
        if action.kind in (Kind.B, Kind.I, Kind.C) and Kind.O in before and Kind.L not in before:
            raise ScheduleError(
                f"what a forward kept is loaded ahead of its use, but on rank {rank} {action} stands behind "
                f"{_text(action, before)}; add {action.stage}L{action.micro_batch}"
            )
        before.append(action.kind)


def _check_reduced_last(rank: int, row: tuple[Action | StageAction, ...]) -> None:
    """G once a stage, behind the last of its backwards."""
    reduced: set[int] = set()
    for action in row:
        if action.stage in reduced and (action.kind is StageKind.G or action.kind in _BACKWARD):
            raise ScheduleError(
                f"a stage reduces its gradients once, when they are final, but on rank {rank} {action} stands behind "
                f"{action.stage}G; move {action.stage}G behind the last B or W of the stage"
            )
        if action.kind is StageKind.G:
            reduced.add(action.stage)


def _check_unsharded(rank: int, row: tuple[Action | StageAction, ...]) -> None:
    """U and H of a stage in turn, and, where there are any, its work between a U and the next H."""
    sharded = {action.stage: True for action in row if action.kind in (StageKind.U, StageKind.H)}
    for action in row:
        if action.stage not in sharded:
            continue
        works = isinstance(action, Action) and action.kind.computes
        if works and sharded[action.stage]:
            wrong = f"{action} stands while stage {action.stage} is sharded"
        elif action.kind in (StageKind.U, StageKind.H) and sharded[action.stage] == (action.kind is StageKind.H):
            state = "sharded" if sharded[action.stage] else "unsharded"
            wrong = f"{action} stands where stage {action.stage} is {state} already"
        else:
            wrong = ""
        if wrong:
            raise ScheduleError(
                f"a stage is unsharded (U) ahead of its work and resharded (H) behind it, in turn, but on rank "
                f"{rank} {wrong}; add or drop a {action.stage}U or {action.stage}H"
            )
        if action.kind in (StageKind.U, StageKind.H):
            sharded[action.stage] = action.kind is StageKind.H


def _text(action: Action, kinds: list[Kind]) -> str:
    return " ".join(f"{action.stage}{kind}{action.micro_batch}" for kind in kinds) or "nothing"
