"""A pipeline whose ranks share processors: who computes while others wait is faster than when all compute.

    rates of a cluster are those of a rank when all of them compute; of r ranks on c cores each has c / r of one

    computing   1 of 4 on 2 cores     one core: twice the rate
                3 of 4                two thirds of a core: 4/3 of the rate
                4 of 4                half a core: the rate

Every action makes progress at the pace of the moment, which changes whenever one begins or ends (processor sharing:
Kleinrock 1967). Ranks of one place of the pipeline compute at the same times. Messages take the time that they take.
Knows schedules and seconds; refuses to know stages' work and clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shardwise.errors import ScheduleError
from shardwise.schedule import Action, Costs, Kind, Schedule

__all__ = ["at_least_s", "shared_seconds"]

_Key = tuple[bool, int, int]  # (whether of the backward, stage, micro-batch)
_BACKWARDS = (Kind.B, Kind.I)


def shared_seconds(schedule: Schedule, costs: Costs, *, crowd: float) -> float:
    """From the first start to the last end of a step on the chain of stages. `costs` are of ranks that all compute;
    crowd: ranks of a processor, 1 or more: so much faster is a rank at most when others wait.

    Raises `ScheduleError` where ranks wait for each other.
    """
    rows = [[each for each in row if isinstance(each, Action) and each.kind.computes] for row in schedule.actions]
    owners, stages = schedule.owners, schedule.num_stages
    done: dict[_Key, float] = {}  # when
    left: dict[int, float] = {}  # place -> seconds of its action that are left, as if all computed
    following = [0] * len(rows)
    now = 0.0
    while any(following[place] < len(row) for place, row in enumerate(rows)):
        waits = math.inf
        for place, row in enumerate(rows):
            if place in left or following[place] == len(row):
                continue
            ready = _ready(row[following[place]], done, owners, stages, costs)
            if ready <= now:
                action = row[following[place]]
                left[place] = costs.of(action.kind, stages)[action.stage]
            else:
                waits = min(waits, ready)
        if not left and waits == math.inf:
            raise ScheduleError(f"ranks of {schedule} wait for each other; check the schedule")
        pace = min(crowd, len(rows) / len(left)) if left else 1.0
        passed = min([(seconds / pace) for seconds in left.values()], default=math.inf)
        passed = min(passed, waits - now)
        now += passed
        for place in list(left):
            left[place] -= passed * pace
            if left[place] <= 1e-15:
                action = rows[place][following[place]]
                if action.kind is not Kind.W and action.kind is not Kind.C:
                    done[action.kind in _BACKWARDS, action.stage, action.micro_batch] = now
                following[place] += 1
                del left[place]
    return now


def at_least_s(work_s: float, pipeline_s: float, *, crowd: float) -> float:
    """What `shared_seconds` is at least, without a simulation: all work on all processors, or the longest way through
    the pipeline at the pace of one that computes alone. work_s: of a rank, the mean; both as if all computed."""
    return max(work_s, pipeline_s / crowd)


def _ready(action: Action, done: Mapping[_Key, float], owners: tuple[int, ...], stages: int, costs: Costs) -> float:
    """When what an action needs has arrived; infinite while nobody knows. What its own rank did is done."""
    s, m = action.stage, action.micro_batch
    if action.kind is Kind.F and s > 0:
        crossing = costs.activation_seconds.get((s - 1, s), 0.0) if owners[s - 1] != owners[s] else 0.0
        return done.get((False, s - 1, m), math.inf) + crossing
    if action.kind in _BACKWARDS and s < stages - 1:
        crossing = costs.gradient_seconds.get((s, s + 1), 0.0) if owners[s + 1] != owners[s] else 0.0
        return done.get((True, s + 1, m), math.inf) + crossing
    return 0.0
