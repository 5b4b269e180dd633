"""What actions and transfers cost in seconds. It does not know whether that was counted or measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Kind
from shardwise.schedule.graph import Edge, Edges
from shardwise.schedule.schedule import Schedule

__all__ = ["Costs", "check_costs"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of every action and transfer of a schedule.

    compute_seconds[kind][s]: one action of that kind on stage s.
    activation_seconds[(s, t)], gradient_seconds[(s, t)]: one transfer along the edge s to t, forward and
    back. An empty mapping means that they are free, any other names every edge between two ranks.
    micro_batch_factors[m]: multiplies everything of micro-batch m (a smaller last one, say); empty means 1.

    Raises ScheduleError if a cost is negative or not finite.
    """

    compute_seconds: Mapping[Kind, tuple[float, ...]]
    activation_seconds: Mapping[Edge, float] = field(default_factory=dict)
    gradient_seconds: Mapping[Edge, float] = field(default_factory=dict)
    micro_batch_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for kind, seconds in self.compute_seconds.items():
            _check_numbers(f"{kind} actions", seconds)
        _check_numbers("activations", self.activation_seconds.values())
        _check_numbers("gradients", self.gradient_seconds.values())
        _check_numbers("micro-batch factors", self.micro_batch_factors)

    @classmethod
    def uniform(cls, num_stages: int, *, forward: float = 1.0, backward: float = 2.0) -> Costs:
        """Equal stages and free transfers; I and W are half of `backward` (F = I = W in arXiv:2401.10241)."""
        half = (backward / 2,) * num_stages
        return cls(
            compute_seconds={
                Kind.F: (forward,) * num_stages,
                Kind.B: (backward,) * num_stages,
                Kind.I: half,
                Kind.W: half,
            }
        )


def check_costs(costs: Costs, schedule: Schedule, edges: Edges) -> None:
    """Raises ScheduleError unless `costs` prices all that `schedule` does on the graph `edges`."""
    used = {action.kind for row in schedule.actions for action in row}
    for kind in sorted(used | costs.compute_seconds.keys()):
        num_given = len(costs.compute_seconds.get(kind, ()))
        if num_given != schedule.num_stages:
            raise ScheduleError(
                f"every kind of action has a cost for each of {schedule.num_stages} stages, but {kind} has "
                f"{num_given}; give compute_seconds[Kind.{kind}] {schedule.num_stages} numbers"
            )
    if len(costs.micro_batch_factors) not in (0, schedule.num_micro_batches):
        raise ScheduleError(
            f"there is a factor for each of {schedule.num_micro_batches} micro-batches or for none, but "
            f"found {len(costs.micro_batch_factors)}; add or drop factors"
        )
    owners = schedule.owners
    crossing = {(s, t) for s, t in edges if owners[s] != owners[t]}
    for name, seconds in (("activation", costs.activation_seconds), ("gradient", costs.gradient_seconds)):
        if seconds and (missing := sorted(crossing - seconds.keys())):
            raise ScheduleError(
                f"{name}_seconds names every edge between two ranks or none, but lacks {missing[0]} "
                f"({len(missing)} of {len(crossing)} are missing); add its seconds"
            )


def _check_numbers(name: str, numbers: Iterable[float]) -> None:
    for number in numbers:
        if not (math.isfinite(number) and number >= 0):
            raise ScheduleError(f"costs are finite and not negative, but {name} have {number}; use seconds from 0 up")
