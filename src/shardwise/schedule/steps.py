"""What the simulator runs: the rows of a schedule as steps that hold all that an item needs.

    COMPUTE  an action: the times its inputs are ready, its seconds, the time it notes   [each by micro-batch]
    BESIDE   what runs beside the work: a queue of the rank instead of the rank itself
    SEND, RECV  the two ends of a transfer: its route

Actions of one kind on one stage share one work, so a step is three small things and makes no object of its own. It
knows neither order nor clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardwise.schedule.actions import Transfer, TransferKind

__all__ = [
    "BESIDE",
    "COMPUTE",
    "NEVER",
    "RECV",
    "SEND",
    "Aside",
    "Input",
    "Link",
    "Queue",
    "Route",
    "Steps",
    "Times",
    "Work",
]

COMPUTE, BESIDE, SEND, RECV = range(4)
NEVER = -1.0
Times = list[float]  # [micro_batch]: seconds, or NEVER


@dataclass(kw_only=True, slots=True)
class Steps:
    """The row of one rank, in columns: code, micro-batch, and its Work, Aside or Route."""

    codes: list[int] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    whats: list[Any] = field(default_factory=list)

    def add(self, code: int, micro_batch: int, what: Work | Aside | Route) -> None:
        """Appends one step."""
        self.codes.append(code)
        self.micro_batches.append(micro_batch)
        self.whats.append(what)


@dataclass(kw_only=True, slots=True)
class Link:
    """What travels from one rank to another; the n-th send meets the n-th receive."""

    sender: int
    receiver: int
    sent: list[int] = field(default_factory=list)  # micro-batches
    routes: list[Route] = field(default_factory=list)  # their ways
    sent_s: list[float] = field(default_factory=list)
    posted_s: list[float] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)  # of what has arrived
    ends_s: list[float] = field(default_factory=list)
    free_s: float = 0.0

    def deliver(self) -> None:
        """Lets the next value arrive, which is both sent and posted."""
        place = len(self.starts_s)
        m, route = self.sent[place], self.routes[place]
        start_s = max(self.sent_s[place], self.posted_s[place], self.free_s)
        self.free_s = route.arrived_s[m] = start_s + route.seconds[m]
        self.starts_s.append(start_s)
        self.ends_s.append(self.free_s)

    def transfers(self) -> tuple[Transfer, ...]:
        """The sends of all that was sent, in order."""
        return tuple(
            Transfer(
                kind=TransferKind.SEND,
                source=route.source,
                target=route.target,
                micro_batch=m,
                gradient=route.source > route.target,
            )
            for m, route in zip(self.sent, self.routes, strict=True)
        )


@dataclass(kw_only=True, slots=True)
class Route:
    """The way of one kind of value from stage `source` to `target` on a link."""

    source: int
    target: int
    link: Link
    seconds: list[float]  # [micro_batch]
    arrived_s: Times


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One value that an action reads: when it is there, and the stage that makes it, forward or backward."""

    ready_s: Times
    stage: int
    forward: bool


class Work(NamedTuple):
    """All actions of one kind on one stage."""

    inputs: tuple[Times, ...]
    seconds: list[float]
    output: Times


@dataclass(kw_only=True, slots=True)
class Queue:
    """What a rank does beside its work, one after another: on the way to the host, back, or to other replicas."""

    free_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class Aside:
    """All actions of one kind on one stage that run beside the work of its rank."""

    queue: Queue
    seconds: list[float]
    after_s: Times | None  # what must have ended
    output: Times
    whole_stage: bool  # it is there for all micro-batches at once

    def enter(self, m: int, now_s: float) -> tuple[float, float]:
        """Queues one of them at `now_s`; returns its start and end."""
        start_s = max(now_s, self.queue.free_s, self.after_s[m] if self.after_s is not None else 0.0)
        self.queue.free_s = end_s = start_s + self.seconds[m]
        if self.whole_stage:
            self.output[:] = [end_s] * len(self.output)
        else:
            self.output[m] = end_s
        return start_s, end_s
