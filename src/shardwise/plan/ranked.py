"""What a search hands back: layouts with their prices in order, and why every other one is not among them.

Values. Knows numbers and words; refuses to know how a price is made, and how a search chooses what to price.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from shardwise.layout import Layout
from shardwise.plan.price import Price
from shardwise.quantities import format_bytes, format_seconds

__all__ = ["Objective", "Ranked", "Rejected", "Rule", "room_of", "value_of"]


class Objective(enum.StrEnum):
    """What a search makes small, and what it prints."""

    TIME = "time"  # seconds of a step
    COST = "cost"  # dollars of a step
    MEMORY = "memory"  # bytes of the fullest rank
    PARETO = "pareto"  # all layouts of which no other one is better in time and in memory
    PARETO_COST = "pareto-cost"  # likewise in time and in cost


class Rule(enum.StrEnum):
    """Why a layout that keeps the rules of layouts is not among the best."""

    MEMORY_BOUND = "out of memory (lower bound)"
    MEMORY = "out of memory"
    ROOM = "too little memory headroom"
    DOMINATED = "recompute or offload not needed"
    SLOWER = "slower"
    BEHIND = "slower (coarse estimate)"
    FAILED = "cannot be estimated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked:
    """One layout that fits. margin: by what share its objective is above the best's; 0 for the best."""

    layout: Layout
    price: Price
    devices: int
    usd: float | None  # of a step
    room_bytes: float  # that the fullest rank has left; less than 0: that it lacks
    host_lacks_bytes: float = 0.0  # of the host's memory, where that has no room for what waits there
    margin: float = 0.0
    exact: bool = False  # priced by a simulation of the schedule, not by its closed form

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return max(lines.total for lines in self.price.memory)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank, and its host, have room."""
        return self.room_bytes >= 0 and not self.host_lacks_bytes

    @property
    def has_room(self) -> bool:
        """Whether it leaves what a layout has to leave that is chosen before others (see `plan.room`)."""
        return self.fits and self.price.has_room

    def __str__(self) -> str:
        money = "" if self.usd is None else f", ${self.usd:.3g}"
        room = f"{format_bytes(abs(self.room_bytes))} {'free' if self.room_bytes >= 0 else 'too much'}"
        return f"{self.layout}: {format_seconds(self.price.step_s)}{money}, {format_bytes(self.peak_bytes)} ({room})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejected:
    """A layout, or all that have some axes in common, that is not among the best. `numbers` are what `reason` says:
    seconds, bytes or shares by name."""

    axes: str
    rule: str
    reason: str
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


def value_of(ranked: Ranked, objective: Objective) -> float:
    """What the objective makes small."""
    if objective is Objective.COST and ranked.usd is not None:
        return ranked.usd
    return ranked.peak_bytes if objective is Objective.MEMORY else ranked.price.step_s


def room_of(price: Price, memory_bytes: tuple[int, ...]) -> float:
    """Bytes that the fullest rank has left of its device's; `memory_bytes[r]`: of the device at place r."""
    return min(float(own) - lines.total for lines, own in zip(price.memory, memory_bytes, strict=True))
