"""A Schedule: which rank owns which stages and in which order it computes; plain data, written as JSON.

It knows neither layouts nor modules, neither transfers nor time: those are added by the passes beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, StageAction, Transfer, parse_row, print_row

__all__ = ["Schedule", "forward_only"]

_BACKWARD = (Kind.B, Kind.I, Kind.W)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The order of work of every rank for one step.

    ranks[r] are the stages that rank r owns, actions[r] what it computes, in order. A schedule without any
    backward is forward-only (evaluation). Raises ScheduleError if counts or ownership do not fit; whether the
    actions are complete, ordered and free of deadlock is the business of `check`.
    """

    name: str
    num_stages: int
    num_micro_batches: int
    ranks: tuple[tuple[int, ...], ...]
    actions: tuple[tuple[Action | StageAction, ...], ...]

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_ownership(self)
        _check_ranges(self)

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @property
    def owners(self) -> tuple[int, ...]:
        """The rank of each stage."""
        rank_of = {s: r for r, stages in enumerate(self.ranks) for s in stages}
        return tuple(rank_of[s] for s in range(self.num_stages))

    @property
    def forward_only(self) -> bool:
        return not any(action.kind in _BACKWARD for row in self.actions for action in row)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.num_stages} stages on {self.num_ranks} ranks, {self.num_micro_batches} micro-batches"
        )

    def text_rows(self) -> tuple[str, ...]:
        """One line of text a rank, such as "0F0 0F1 0B0 0B1"."""
        return tuple(print_row(row) for row in self.actions)

    def to_json(self) -> str:
        """JSON text; the inverse of `from_json`."""
        values = {
            "name": self.name,
            "num_stages": self.num_stages,
            "num_micro_batches": self.num_micro_batches,
            "ranks": self.ranks,
            "actions": self.text_rows(),
        }
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The schedule that `to_json` wrote, or one written by hand. Raises ScheduleError."""
        try:
            values: dict[str, Any] = json.loads(text)
            return cls(
                name=str(values["name"]),
                num_stages=int(values["num_stages"]),
                num_micro_batches=int(values["num_micro_batches"]),
                ranks=tuple(tuple(int(s) for s in stages) for stages in values["ranks"]),
                actions=tuple(_parse_actions(row) for row in values["actions"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ScheduleError(
                f"a schedule in JSON has name, num_stages, num_micro_batches, ranks (lists of stages) and "
                f"actions (one text a rank), but reading it failed with {type(error).__name__}: {error}; "
                "compare with the output of Schedule.to_json"
            ) from error


def forward_only(schedule: Schedule) -> Schedule:
    """The same schedule without its backward actions, for evaluation."""
    rows = tuple(tuple(action for action in row if action.kind is Kind.F) for row in schedule.actions)
    return replace(schedule, actions=rows)


def _parse_actions(text: str) -> tuple[Action | StageAction, ...]:
    row = parse_row(text)
    actions = tuple(item for item in row if not isinstance(item, Transfer))
    if len(actions) != len(row):
        transfer = next(item for item in row if isinstance(item, Transfer))
        raise ScheduleError(
            f"a schedule holds no transfers, they are added later, but a row holds {transfer}; leave it out"
        )
    return actions


def _check_counts(schedule: Schedule) -> None:
    if schedule.num_stages < 1 or schedule.num_micro_batches < 1:
        raise ScheduleError(
            f"a schedule has at least 1 stage and 1 micro-batch, but got {schedule.num_stages} stages and "
            f"{schedule.num_micro_batches} micro-batches; raise the one that is 0"
        )
    if len(schedule.ranks) != len(schedule.actions):
        raise ScheduleError(
            f"every rank has one row of actions, but there are {len(schedule.ranks)} ranks and "
            f"{len(schedule.actions)} rows; give each rank its row"
        )


def _check_ownership(schedule: Schedule) -> None:
    owned = sorted(s for stages in schedule.ranks for s in stages)
    if owned != list(range(schedule.num_stages)):
        raise ScheduleError(
            f"every stage 0 to {schedule.num_stages - 1} has exactly one rank, but the ranks own "
            f"{list(schedule.ranks)}; name each stage once"
        )
    if empty := [r for r, stages in enumerate(schedule.ranks) if not stages]:
        raise ScheduleError(f"every rank owns a stage, but rank {empty[0]} owns none; use fewer ranks")


def _check_ranges(schedule: Schedule) -> None:
    for r, row in enumerate(schedule.actions):
        for action in row:
            last = isinstance(action, Action) and action.micro_batch >= schedule.num_micro_batches
            if action.stage >= schedule.num_stages or last:
                raise ScheduleError(
                    f"actions stay within {schedule.num_stages} stages and {schedule.num_micro_batches} "
                    f"micro-batches, but rank {r} holds {action}; drop it or raise the count"
                )
