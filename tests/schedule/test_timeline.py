"""A timeline knows its length, its busy ranks and its bubble, wherever it came from."""

from __future__ import annotations

import pytest
from hypothesis import given

from schedule.strategies import schedules
from shardwise.errors import ScheduleError
from shardwise.schedule import Costs, Edges, Schedule, Span, Timeline, parse, simulate


def span(rank: int, action: str, start_s: float, end_s: float) -> Span:
    return Span(rank=rank, action=parse(action), start_s=start_s, end_s=end_s)


def test_idle_time_is_what_no_action_fills() -> None:
    recorded = Timeline(num_ranks=2, spans=(span(0, "0F0", 10, 11), span(0, "0S1F0", 11, 13), span(1, "1F0", 13, 14)))
    assert recorded.seconds == 4
    assert recorded.busy_seconds == (1, 1)
    assert recorded.bubble_fraction == 0.75
    assert str(recorded) == "2 ranks, 4 s, bubble 75.0 %"


def test_a_timeline_in_which_nothing_happens_has_no_bubble() -> None:
    empty = Timeline(num_ranks=3, spans=())
    assert (empty.seconds, empty.bubble_fraction, empty.busy_seconds) == (0.0, 0.0, (0.0, 0.0, 0.0))


@given(schedules())
def test_a_timeline_survives_json(made: tuple[Schedule, Edges]) -> None:
    schedule, edges = made
    timeline = simulate(schedule, edges, costs=Costs.uniform(schedule.num_stages, forward=1 / 3, backward=0.7))
    assert Timeline.from_json(timeline.to_json()) == timeline


@given(schedules())
def test_spans_that_a_simulation_has_not_made_yet_count_as_those_it_makes(made: tuple[Schedule, Edges]) -> None:
    schedule, edges = made
    late = simulate(schedule, edges, costs=Costs.uniform(schedule.num_stages, forward=1 / 3, backward=0.7))
    numbers = (late.start_s, late.seconds, late.busy_seconds, late.bubble_fraction, len(late.spans))
    made_now = Timeline(num_ranks=late.num_ranks, spans=tuple(late.spans))
    assert numbers == (
        made_now.start_s,
        made_now.seconds,
        made_now.busy_seconds,
        made_now.bubble_fraction,
        len(made_now.spans),
    )
    assert made_now == late
    assert hash(made_now) == hash(late)
    assert late.spans[0] == made_now.spans[0]
    assert repr(late.spans) == repr(made_now.spans)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"num_ranks": 1, "spans": [[0, "0F0", 1]]}'])
def test_json_that_is_no_timeline_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="compare with the output of Timeline.to_json"):
        Timeline.from_json(text)


@pytest.mark.parametrize("wrong", [(2, 0.0, 1.0), (-1, 0.0, 1.0), (0, 1.0, 0.0), (0, float("nan"), 1.0)])
def test_a_span_on_no_rank_or_backwards_in_time_is_refused(wrong: tuple[int, float, float]) -> None:
    rank, start_s, end_s = wrong
    with pytest.raises(ScheduleError, match="check the rank and the clock"):
        Timeline(num_ranks=2, spans=(span(rank, "0F0", start_s, end_s),))
