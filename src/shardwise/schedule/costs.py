"""What actions and transfers cost in seconds. It does not know whether that was counted or measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Kind, StageKind
from shardwise.schedule.graph import Edge, Edges
from shardwise.schedule.schedule import Schedule

__all__ = ["Costs", "check_costs"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of every action and transfer of a schedule.

    compute_seconds[kind][s]: one action of that kind on stage s; C (the forward again) costs what F does if not
    given.
    beside_seconds[kind][s]: one O, L, G, U or H on stage s, which run beside the work of the rank: O and L on its
    way to the host and back, the others on the one to the replicas of the model. A kind not given is free.
    activation_seconds[(s, t)], gradient_seconds[(s, t)]: one transfer along the edge s to t, forward and
    back. An empty mapping means that they are free, any other names every edge between two ranks.
    micro_batch_factors[m]: multiplies everything of micro-batch m (a smaller last one, say); empty means 1.

    Raises ScheduleError if a cost is negative or not finite.
    """

    compute_seconds: Mapping[Kind, tuple[float, ...]]
    activation_seconds: Mapping[Edge, float] = field(default_factory=dict)
    gradient_seconds: Mapping[Edge, float] = field(default_factory=dict)
    micro_batch_factors: tuple[float, ...] = ()
    beside_seconds: Mapping[Kind | StageKind, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, seconds in (*self.compute_seconds.items(), *self.beside_seconds.items()):
            _check_numbers(f"{kind} actions", seconds)
        _check_numbers("activations", self.activation_seconds.values())
        _check_numbers("gradients", self.gradient_seconds.values())
        _check_numbers("micro-batch factors", self.micro_batch_factors)

    def of(self, kind: Kind | StageKind, num_stages: int) -> tuple[float, ...]:
        """[s]: the seconds of one action of that kind on stage s of `num_stages`."""
        if isinstance(kind, Kind) and kind.computes:
            return self.compute_seconds[Kind.F if kind is Kind.C and kind not in self.compute_seconds else kind]
        return self.beside_seconds.get(kind, (0.0,) * num_stages)

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
    needed = {Kind.F if kind is Kind.C else kind for kind in used if isinstance(kind, Kind) and kind.computes}
    for kind in sorted(needed | costs.compute_seconds.keys()):
        _check_count("compute_seconds", kind, costs.compute_seconds.get(kind, ()), schedule.num_stages)
    for beside, each in costs.beside_seconds.items():
        _check_count("beside_seconds", beside, each, schedule.num_stages)
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


def _check_count(table: str, kind: Kind | StageKind, seconds: tuple[float, ...], num_stages: int) -> None:
    if len(seconds) != num_stages:
        raise ScheduleError(
            f"every kind of action has a cost for each of {num_stages} stages, but {kind} has {len(seconds)}; give "
            f"{table}[{type(kind).__name__}.{kind}] {num_stages} numbers"
        )


def _check_numbers(name: str, numbers: Iterable[float]) -> None:
    for number in numbers:
        if not (math.isfinite(number) and number >= 0):
            raise ScheduleError(f"costs are finite and not negative, but {name} have {number}; use seconds from 0 up")
