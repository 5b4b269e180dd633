"""When the actions of a step ran on this rank: marks of a clock while they run, seconds once the step is over.

A mark is taken in well under a microsecond and costs no memory to speak of; on a GPU it is an event of the stream, read
after the step. Knows neither other ranks nor schedules.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from shardwise.schedule.actions import Action, StageAction

__all__ = ["Clock", "DeviceClock", "DeviceEvent", "HostClock", "Moment", "Moments", "clock_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """When an action ran on this rank, in seconds of the monotonic clock of the host.

    From `start_s` to `ready_s` it waited for what other ranks send, from there to `end_s` it computed.
    """

    action: Action | StageAction
    start_s: float
    end_s: float
    ready_s: float

    @property
    def compute_s(self) -> float:
        return self.end_s - self.ready_s


class Clock(Protocol):
    """`now` takes a mark, at once; `seconds` reads marks as times of the host's clock, `between` how far two are apart.

    Reading waits until what was marked is done; `seconds` also for what was asked for since.
    """

    @property
    def now(self) -> Callable[[], Any]: ...

    def seconds(self, marks: Sequence[Any]) -> list[float]: ...

    def between(self, first: Any, second: Any) -> float: ...


class HostClock:
    """The monotonic clock of this host: what is computed is done when the call returns."""

    def __init__(self) -> None:
        self.now: Callable[[], Any] = time.perf_counter

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        return list(marks)

    def between(self, first: Any, second: Any) -> float:
        return float(second - first)


class DeviceEvent(Protocol):
    """What this file uses of `torch.cuda.Event`."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class DeviceClock:
    """Events on the stream of a device, told in seconds of the host's clock.

    The two clocks are tied together when marks are read: an event is recorded and waited for, and the host's clock read
    right behind it. So they do not drift apart, and nothing waits during the step. The error is what the host takes to
    notice an event, some microseconds.
    """

    def __init__(
        self, new_event: Callable[[], DeviceEvent], *, host_now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._new_event = new_event
        self._host_now = host_now
        self.now: Callable[[], Any] = self._mark

    def _mark(self) -> DeviceEvent:
        event = self._new_event()
        event.record()
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        if not marks:
            return []
        last = self._mark()
        last.synchronize()
        host_s = self._host_now()
        return [host_s - mark.elapsed_time(last) / 1e3 for mark in marks]  # torch tells milliseconds

    def between(self, first: Any, second: Any) -> float:
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3


class Moments(Sequence[Moment]):
    """The moments of a step, in order. Marks are read when somebody looks: soon after the step, on a device."""

    def __init__(self, clock: Clock, actions: Sequence[Action | StageAction], marks: Sequence[Any]) -> None:
        """`marks` are start, inputs ready and end of every action, one after another."""
        self._clock = clock
        self._actions = actions
        self._marks = marks

    @cached_property
    def _read(self) -> tuple[Moment, ...]:
        seconds = self._clock.seconds(self._marks)
        return tuple(
            Moment(action, start_s=start_s, ready_s=ready_s, end_s=end_s)
            for action, start_s, ready_s, end_s in zip(
                self._actions, seconds[0::3], seconds[1::3], seconds[2::3], strict=True
            )
        )

    @property
    def busy_s(self) -> float:
        """Seconds in which this rank computed: to be had without waiting for what follows the step."""
        ends = zip(self._marks[1::3], self._marks[2::3], strict=True)
        return sum(self._clock.between(ready, end) for ready, end in ends)

    def __len__(self) -> int:
        return len(self._actions)

    def __getitem__(self, index: Any) -> Any:
        return self._read[index]

    def __iter__(self) -> Iterator[Moment]:
        return iter(self._read)


def clock_of(device: torch.device) -> Clock:
    """The clock by which a device's work is timed."""
    if device.type == "cuda":
        return DeviceClock(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
    return HostClock()
