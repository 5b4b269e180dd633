"""What a step took, read off its timeline, makes the simulator draw the same timeline again."""

from __future__ import annotations

import pytest

from schedule.test_waits import timeline_of
from shardwise.schedule import Costs, Kind, chain, generate, simulate
from shardwise.schedule.measured_costs import measured_costs


@pytest.mark.parametrize("name", ["naive", "gpipe", "1f1b"])
def test_the_costs_of_a_simulated_step_are_found_again(name: str) -> None:
    schedule, edges = generate(name, num_ranks=3, num_micro_batches=6), chain(3)
    costs = Costs(
        compute_seconds={Kind.F: (1.0, 1.5, 2.0), Kind.B: (2.0, 2.5, 3.0)},
        activation_seconds=dict.fromkeys(edges, 0.25),
        gradient_seconds=dict.fromkeys(edges, 0.5),
    )
    timeline = simulate(schedule, edges, costs=costs)
    found = measured_costs(timeline, schedule, edges)
    for kind, seconds in costs.compute_seconds.items():
        assert found.compute_seconds[kind] == pytest.approx(seconds)
    assert simulate(schedule, edges, costs=found).seconds == pytest.approx(timeline.seconds, rel=0.03)


def test_the_median_does_not_see_one_slow_action() -> None:
    schedule = generate("gpipe", num_ranks=1, num_micro_batches=3)
    timeline = timeline_of("0F0:0-1 0F1:1-2 0F2:2-12 0B0:12-14 0B1:14-16 0B2:16-18")
    assert measured_costs(timeline, schedule, chain(1)).compute_seconds == {Kind.F: (1.0,), Kind.B: (2.0,)}


def test_a_transfer_is_seen_only_by_who_had_nothing_else_to_do() -> None:
    schedule = generate("gpipe", num_ranks=2, num_micro_batches=2)
    timeline = timeline_of("0F0:0-1 0F1:1-2 0B0:9-10 0B1:10-11", "1F0:1.5-4 1F1:4-6 1B0:6-8 1B1:8-9")
    costs = measured_costs(timeline, schedule, chain(2))
    assert costs.activation_seconds == {(0, 1): 0.5}  # the second one came while rank 1 was computing
    assert costs.gradient_seconds == {(0, 1): 1.0}
