"""When actions ran: told in seconds of the host's clock, whatever clock took the marks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwise.execute.moments import DeviceClock, HostClock, Moments, clock_of
from shardwise.schedule import Action, parse_row


def actions(text: str) -> tuple[Action, ...]:
    return tuple(action for action in parse_row(text) if isinstance(action, Action))


class Device:
    """A device whose clock runs on its own: it started at another time, and work is done later than it is asked for."""

    def __init__(self, *, offset_s: float) -> None:
        self.host_s = 100.0
        self.offset_s = offset_s
        self.done_s = 0.0  # of the host's clock: when everything that was asked for is done

    def compute(self, seconds: float) -> None:
        """The host goes on after a millisecond, the device is busy for `seconds`."""
        self.done_s = max(self.done_s, self.host_s) + seconds
        self.host_s += 0.001

    def event(self) -> Event:
        return Event(self)

    def now(self) -> float:
        return self.host_s


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.device_s = float("nan")

    def record(self) -> None:
        self.device_s = max(self.device.done_s, self.device.host_s) + self.device.offset_s

    def synchronize(self) -> None:
        self.device.host_s = max(self.device.host_s, self.device_s - self.device.offset_s)

    def elapsed_time(self, end_event: Any) -> float:
        return 1e3 * (end_event.device_s - self.device_s)


def test_the_host_tells_what_it_marked() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    first, second = clock.now(), clock.now()
    assert clock.seconds([first, second]) == [first, second]
    assert first <= second


def test_an_action_waits_first_and_computes_then() -> None:
    moments = Moments(HostClock(), actions("0F0 0B0"), [1.0, 1.5, 2.0, 2.0, 2.0, 5.0])
    assert [(str(m.action), m.start_s, m.ready_s, m.end_s, m.compute_s) for m in moments] == [
        ("0F0", 1.0, 1.5, 2.0, 0.5),
        ("0B0", 2.0, 2.0, 5.0, 3.0),
    ]
    assert len(moments) == 2
    assert moments.busy_s == 3.5
    assert moments[1].action == actions("0B0")[0]


@pytest.mark.parametrize("offset_s", [0.0, -1000.0, 50_000.0])
def test_events_of_a_device_are_told_in_seconds_of_the_host(offset_s: float) -> None:
    device = Device(offset_s=offset_s)
    clock = DeviceClock(device.event, host_now=device.now)
    marks = [clock.now()]
    device.compute(2.0)
    marks.append(clock.now())
    device.compute(3.0)
    marks.append(clock.now())
    assert device.host_s == pytest.approx(100.002)  # nobody waited for the device
    assert clock.seconds(marks) == pytest.approx([100.0, 102.0, 105.0])


def test_what_a_device_computed_is_told_without_waiting_for_what_it_does_next() -> None:
    device = Device(offset_s=77.0)
    clock = DeviceClock(device.event, host_now=device.now)
    marks = [clock.now(), clock.now()]
    device.compute(2.0)
    marks.append(clock.now())
    device.compute(1000.0)  # the optimizer, say
    assert Moments(clock, actions("0F0"), marks).busy_s == pytest.approx(2.0)
    assert device.host_s < 1000.0


def test_a_device_that_did_nothing_is_not_waited_for() -> None:
    device = Device(offset_s=0.0)
    device.done_s = 1e6
    assert DeviceClock(device.event, host_now=device.now).seconds([]) == []
    assert device.host_s == 100.0


def test_marks_are_read_once_and_only_when_somebody_looks() -> None:
    class Counting(HostClock):
        reads = 0

        def seconds(self, marks: Any) -> list[float]:
            self.reads += 1
            return super().seconds(marks)

    clock = Counting()
    moments = Moments(clock, actions("0F0"), [0.0, 0.0, 1.0])
    assert (len(moments), clock.reads) == (1, 0)
    assert [m.end_s for m in moments] == [m.end_s for m in moments]
    assert clock.reads == 1
