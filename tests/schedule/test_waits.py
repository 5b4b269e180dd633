"""Waiting for others to compute is told apart from waiting for what they have computed."""

from __future__ import annotations

import pytest
from hypothesis import given

from schedule.strategies import schedules
from shardwise.schedule import Costs, Edges, Schedule, Span, Timeline, chain, generate, parse, simulate
from shardwise.schedule.waits import Waits, waits


def timeline_of(*rows: str) -> Timeline:
    """One text a rank, such as "0F0:0-1 0B0:3-4": action, start and end."""
    spans = []
    for rank, row in enumerate(rows):
        for word in row.split():
            action, _, seconds = word.partition(":")
            start, _, end = seconds.partition("-")
            spans.append(Span(rank=rank, action=parse(action), start_s=float(start), end_s=float(end)))
    return Timeline(num_ranks=len(rows), spans=tuple(spans))


def test_a_rank_waits_for_a_value_to_be_made_and_then_for_it_to_arrive() -> None:
    # rank 0  0>>......0<   rank 1 sees the forward after 3 s, half a second after it was made
    # rank 1  ...0>0<....
    seen = waits(timeline_of("0F0:0-2.5 0B0:6-8", "1F0:3-4 1B0:4-5"))
    assert seen == (
        Waits(busy_s=4.5, bubble_s=2.5, exposed_s=1.0),  # the gradient was made at 5 s
        Waits(busy_s=2.0, bubble_s=2.5 + 3.0, exposed_s=0.5),  # and nothing was left to do after it
    )


def test_a_pause_between_two_actions_that_had_all_they_need_is_no_bubble() -> None:
    assert waits(timeline_of("0F0:10-11 0F1:11.25-12"))[0] == Waits(busy_s=1.75, bubble_s=0.0, exposed_s=0.25)


def test_a_sum_of_gradients_behind_the_last_action_is_exposed_and_one_beside_it_is_hidden() -> None:
    seen = waits(timeline_of("0F0:0-1 0B0:3-5 0G:4-7", "1F0:1-2 1B0:2-3 1G:3-3.5"))
    assert seen == (
        Waits(busy_s=3.0, bubble_s=2.0, exposed_s=2.0),
        Waits(busy_s=2.0, bubble_s=1.0 + 3.5, exposed_s=0.5),
    )


def test_a_skip_connection_is_waited_for_like_any_edge() -> None:
    rows = ("0F0:0-4", "1F0:0-1", "2F0:5-6")
    assert waits(timeline_of(*rows), frozenset({(0, 2), (1, 2)}))[2] == Waits(busy_s=1, bubble_s=4, exposed_s=1)
    assert waits(timeline_of(*rows), chain(3))[2] == Waits(busy_s=1, bubble_s=1, exposed_s=4)


@given(schedules())
def test_with_free_transfers_all_idle_time_is_bubble(made: tuple[Schedule, Edges]) -> None:
    schedule, edges = made
    timeline = simulate(schedule, edges, costs=Costs.uniform(schedule.num_stages))
    for rank, each in enumerate(waits(timeline, edges)):
        assert each.exposed_s == pytest.approx(0.0)
        assert each.busy_s == pytest.approx(timeline.busy_seconds[rank])
        assert each.seconds == pytest.approx(timeline.seconds)


def test_transfers_that_take_time_are_exposed_where_nothing_hides_them() -> None:
    edges = chain(2)
    costs = Costs(
        compute_seconds=Costs.uniform(2).compute_seconds,
        activation_seconds={(0, 1): 0.5},
        gradient_seconds={(0, 1): 0.25},
    )
    one = waits(simulate(generate("gpipe", num_ranks=2, num_micro_batches=1), edges, costs=costs), edges)
    assert [each.exposed_s for each in one] == [0.25, 0.5]
    many = waits(simulate(generate("gpipe", num_ranks=2, num_micro_batches=4), edges, costs=costs), edges)
    assert [each.exposed_s for each in many] == [0.25, 0.5]  # the others travel while ranks compute
