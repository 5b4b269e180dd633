"""How many micro-batches each stage keeps when its rank keeps the most: read off a schedule's rows.

One that waits for its gradients of weights alone counts by what it still keeps, so that the number times what one
micro-batch keeps is what the stage keeps then. Refuses to know seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.plan.stage_work import StageWork
from shardwise.schedule import Action, Kind, Schedule

__all__ = ["kept_micro_batches"]


def kept_micro_batches(schedule: Schedule, stages: Sequence[StageWork]) -> tuple[float, ...]:
    """[s]: micro-batches of stage s that are kept at the moment when its rank keeps the most bytes.

    stages: by their number, all of the schedule. A stage whose forward is computed again as an action of its own (C)
    counts from that action on.
    """
    waiting = [stage.weight_bytes / stage.saved_bytes if stage.saved_bytes else 0.0 for stage in stages]
    at_peak = [0.0] * len(stages)
    if schedule.forward_only:
        return tuple(at_peak)
    for own, row in zip(schedule.ranks, schedule.actions, strict=True):
        kept, most = dict.fromkeys(own, 0.0), 0.0
        actions = [action for action in row if isinstance(action, Action)]
        again = {(action.stage, action.micro_batch) for action in actions if action.kind is Kind.C}
        for action in actions:
            kept[action.stage] += _change(action, again, waiting[action.stage])
            now = sum(number * stages[stage].saved_bytes for stage, number in kept.items())
            if now > most:
                most = now
                for stage, number in kept.items():
                    at_peak[stage] = number
    return tuple(at_peak)


def _change(action: Action, again: set[tuple[int, int]], waiting: float) -> float:
    """Micro-batches that the stage keeps more behind this action."""
    first = 0.0 if (action.stage, action.micro_batch) in again else 1.0
    match action.kind:
        case Kind.F | Kind.L:
            return first
        case Kind.O:
            return -first
        case Kind.C:
            return 1.0 - first
        case Kind.I:
            return waiting - 1.0
        case Kind.W:
            return -waiting
        case Kind.B:
            return -1.0
