"""Measurements of a run from events and recordings by hand."""

from __future__ import annotations

import pytest

from schedule.test_recording import recording
from shardwise.errors import ConfigError
from shardwise.events import Event, JsonlSink
from shardwise.report.read_run import measured_of, read_run


def step(number: int, rank: int = 0, **data: object) -> Event:
    return Event(kind="step", rank=rank, step=number, seconds=float(number), data=data)


def two_ranks(number: int, seconds: float) -> list[Event]:
    """Rank 0 ends its actions at 0.7 of the step, rank 1 at 0.5; sums are over at 0.8 on both."""
    return [
        step(
            number, 0, step_s=seconds, data_s=0.1, computed_s=0.7, sums_s=0.1, optimizer_s=0.05, peak_bytes=100 + number
        ),
        step(
            number, 1, step_s=seconds, data_s=0.1, computed_s=0.5, sums_s=0.3, optimizer_s=0.02, peak_bytes=200 - number
        ),
    ]


EVENTS = [event for number, seconds in enumerate((9.0, 8.0, 1.0, 1.2, 1.1)) for event in two_ranks(number, seconds)]


def test_seconds_are_medians_of_the_steps_behind_the_first_two() -> None:
    measured = measured_of(EVENTS)
    assert measured.steps == 3
    assert measured.step_s == 1.1
    assert measured.optimizer_s == 0.05  # of the rank that took longest


def test_sums_that_show_are_counted_from_the_last_action_of_all() -> None:
    measured = measured_of(EVENTS)
    assert measured.pipeline_s == pytest.approx(0.6)
    assert measured.sums_s == pytest.approx(0.1)


def test_memory_is_the_most_of_any_step_that_counts() -> None:
    assert measured_of(EVENTS).memory == {0: 104, 1: 198}


def test_what_no_event_tells_is_not_there() -> None:
    measured = measured_of([step(number, step_s=1.0) for number in range(4)])
    assert measured.pipeline_s is None
    assert measured.sums_s is None
    assert measured.memory == {}
    assert measured.traffic == {}
    assert measured_of([step(0, step_s=1.0)]).step_s is None


def test_actions_waiting_and_messages_are_those_of_recorded_steps() -> None:
    # see test_recording: rank 0 runs F in 1 s and B in 2 s, and waits 3.5 s; rank 1 waits 4 s
    measured = measured_of([step(number, step_s=1.0) for number in range(6)], [recording()])
    assert measured.recorded == 1
    assert measured.actions == {"F": {0: 1.0, 1: 1.0}, "B": {0: 2.0, 1: 1.5}}
    assert measured.waiting == {0: pytest.approx(3.5), 1: pytest.approx(4.0)}
    assert measured.forward_s == {(0, 1): pytest.approx(0.5)}
    assert measured.backward_s == {(0, 1): pytest.approx(0.5)}


def test_recordings_of_the_first_two_steps_are_left_out() -> None:
    measured = measured_of([step(number, step_s=1.0) for number in range(6)], [recording(step=1)])
    assert measured.recorded == 0
    assert measured.actions == {}


def test_bytes_are_those_of_a_step_by_rank_and_kind() -> None:
    events = [
        step(number, rank, step_s=1.0, sent_bytes={"pp.send": 10 + rank}) for number in range(4) for rank in (0, 1)
    ]
    assert measured_of(events).traffic == {0: {"pp.send": 10}, 1: {"pp.send": 11}}


def test_of_a_resumed_run_what_follows_its_last_start_counts(tmp_path) -> None:
    with JsonlSink(tmp_path / "events") as sink:
        for number in range(6):
            sink.emit(step(number, step_s=5.0))
        sink.emit(Event(kind="start", rank=0, seconds=0.0))
        for number in range(3, 8):
            sink.emit(step(number, step_s=1.0))
    measured = read_run(tmp_path)
    assert (measured.steps, measured.step_s) == (3, 1.0)


def test_a_run_without_steps_is_an_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no events"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="train on"):
        measured_of([])
