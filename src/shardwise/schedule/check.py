"""Proves that a schedule can run on a stage graph: complete, on the right ranks, in order, free of deadlock.

One function a rule; each error names the rank and the action. It knows no costs and needs no device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, StageAction
from shardwise.schedule.check_extras import check_extras
from shardwise.schedule.check_transfers import check_transfers
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges, checked
from shardwise.schedule.progress import run
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.transfers import Row, with_transfers

__all__ = ["Check", "check"]

_BEFORE_RECOMPUTE = (Kind.F, Kind.O, Kind.L)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a checked schedule needs: the most forwards kept at once whose backward is not done (B, or I and
    W).

    Counted in micro-batches, for each stage and, over all its stages, for each rank. A forward-only schedule
    keeps none; what is computed again is kept from C on, and what is on the host (O to L) not at all.
    """

    peak_per_rank: tuple[int, ...]
    peak_per_stage: tuple[int, ...]

    def __str__(self) -> str:
        return f"in flight at most {', '.join(map(str, self.peak_per_rank))} micro-batches on rank 0, 1, ..."


def check(schedule: Schedule, edges: Edges | None = None, *, rows: tuple[Row, ...] | None = None) -> Check:
    """Checks `schedule` with the transfers that `with_transfers` adds, or with those in `rows`.

    `edges` is the chain if not given. Raises ScheduleError that names the first broken rule.
    """
    edges = checked(edges, schedule.num_stages)
    _check_owned(schedule)
    _check_complete(schedule)
    _check_ordered(schedule)
    check_extras(schedule)
    if rows is None:
        rows = with_transfers(schedule, edges)
    check_transfers(schedule, edges, rows)
    run(schedule, edges, Costs.uniform(schedule.num_stages), rows=rows)  # raises where ranks wait for each other
    return _peaks(schedule)


def _check_owned(schedule: Schedule) -> None:
    owners = schedule.owners
    for r, row in enumerate(schedule.actions):
        for action in row:
            if owners[action.stage] != r:
                raise ScheduleError(
                    f"a rank runs only its own stages, but rank {r} runs {action} and stage {action.stage} "
                    f"is on rank {owners[action.stage]}; move the action there"
                )


def _check_complete(schedule: Schedule) -> None:
    """Every stage and micro-batch: one F, and, unless forward-only, one B or one I and one W."""
    counts = Counter(
        (action.stage, action.micro_batch, action.kind)
        for row in schedule.actions
        for action in row
        if isinstance(action, Action)
    )
    backwards = ((0, 0, 0),) if schedule.forward_only else ((1, 0, 0), (0, 1, 1))
    for s in range(schedule.num_stages):
        for m in range(schedule.num_micro_batches):
            num_forwards = counts[s, m, Kind.F]
            if num_forwards != 1:
                raise ScheduleError(
                    f"every stage runs each micro-batch forward once, but {s}F{m} stands in the schedule "
                    f"{num_forwards} times; {'add it' if num_forwards == 0 else 'drop the repetition'}"
                )
            found = counts[s, m, Kind.B], counts[s, m, Kind.I], counts[s, m, Kind.W]
            if found not in backwards:
                raise ScheduleError(
                    f"every stage runs each micro-batch backward once, as B or as I and W, but stage {s} has "
                    f"for micro-batch {m}: {found[0]} B, {found[1]} I, {found[2]} W; keep {s}B{m} alone or "
                    f"{s}I{m} and {s}W{m}"
                )


def _check_ordered(schedule: Schedule) -> None:
    """F before B or I, and I before W, on the one rank that runs them."""
    needed = {Kind.B: Kind.F, Kind.I: Kind.F, Kind.W: Kind.I}
    for r, row in enumerate(schedule.actions):
        done: set[tuple[Kind, int, int]] = set()
        for action in row:
            if not isinstance(action, Action):
                continue
            kind, place = action.kind, (action.stage, action.micro_batch)
            earlier = needed.get(kind)
            if earlier is not None and (earlier, *place) not in done:
                raise ScheduleError(
                    f"a stage runs F before B or I, and I before W, but on rank {r} {action} stands "
                    f"ahead of {place[0]}{earlier}{place[1]}; swap them"
                )
            done.add((kind, *place))


def _peaks(schedule: Schedule) -> Check:
    changes = [_changes(row) for row in schedule.actions]
    return Check(
        peak_per_rank=tuple(_peak(schedule, changed) for changed in changes),
        peak_per_stage=tuple(
            _peak(schedule, [(stage, change) for stage, change in changes[r] if stage == s])
            for s, r in enumerate(schedule.owners)
        ),
    )


def _changes(row: tuple[Action | StageAction, ...]) -> list[tuple[int, int]]:
    """(stage, by how much) what is kept for a backward to come changes with each action of a row."""
    again = {(a.stage, a.micro_batch) for a in row if isinstance(a, Action) and a.kind is Kind.C}
    # W still needs what the forward kept
    change_of = {Kind.F: 1, Kind.C: 1, Kind.L: 1, Kind.O: -1, Kind.B: -1, Kind.W: -1}
    changes = []
    for action in row:
        if isinstance(action, Action):
            inputs_only = action.kind in _BEFORE_RECOMPUTE and (action.stage, action.micro_batch) in again
            changes.append((action.stage, 0 if inputs_only else change_of.get(action.kind, 0)))
    return changes


def _peak(schedule: Schedule, changes: list[tuple[int, int]]) -> int:
    """The most forwards that are kept at once for a backward to come."""
    if schedule.forward_only:
        return 0
    return max(accumulate((change for _, change in changes), initial=0))
