"""Spans: what ran on which rank from when to when; and many of them as columns of numbers.

A simulation of a large pipeline knows a million times. They are kept as it noted them, and become spans when somebody
looks at them; sums over them do not need to. It knows no clocks and no meaning of the actions beyond what computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import overload

from shardwise.schedule.actions import Action, StageAction, Transfer

__all__ = ["Lane", "Lanes", "Span"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One action, or one transfer on its way, from `start_s` to `end_s` (seconds).

    The rank of a transfer is its sender's; a recorded timeline may also hold the receiver's side.
    """

    rank: int
    action: Action | StageAction | Transfer
    start_s: float
    end_s: float

    def __str__(self) -> str:
        return f"rank {self.rank} {self.action} {self.start_s:.6g}..{self.end_s:.6g} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """What one rank did, or one link carried: times in order, and the actions, made when they are needed."""

    rank: int
    starts_s: list[float]
    ends_s: list[float]
    actions: Callable[[], Sequence[Action | StageAction | Transfer]]
    computes: bool  # whether there are actions here that keep the rank busy


class Lanes(Sequence[Span]):
    """The spans of all lanes, one lane after the other; equal to any sequence of the same spans."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = tuple(lanes)

    @cached_property
    def _spans(self) -> tuple[Span, ...]:
        return tuple(
            Span(rank=lane.rank, action=action, start_s=start_s, end_s=end_s)
            for lane in self._lanes
            for action, start_s, end_s in zip(lane.actions(), lane.starts_s, lane.ends_s, strict=True)
        )

    @property
    def start_s(self) -> float:
        """The first start; 0.0 without spans."""
        return min(chain.from_iterable(lane.starts_s for lane in self._lanes), default=0.0)

    @property
    def end_s(self) -> float:
        """The last end; 0.0 without spans."""
        return max(chain.from_iterable(lane.ends_s for lane in self._lanes), default=0.0)

    def busy_seconds(self, num_ranks: int) -> tuple[float, ...]:
        """What each rank spent computing."""
        busy = [0.0] * num_ranks
        for lane in self._lanes:
            if lane.computes:
                for action, start_s, end_s in zip(lane.actions(), lane.starts_s, lane.ends_s, strict=True):
                    if isinstance(action, Action) and action.kind.computes:
                        busy[lane.rank] += end_s - start_s
        return tuple(busy)

    def __len__(self) -> int:
        return sum(len(lane.starts_s) for lane in self._lanes)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | Sequence[Span]:
        return self._spans[index]

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._spans == tuple(other)

    def __hash__(self) -> int:
        return hash(self._spans)

    def __repr__(self) -> str:
        return repr(self._spans)
