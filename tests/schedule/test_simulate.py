"""The simulator agrees with times worked out by hand, and with a second, slower way to work them out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule.helpers import schedule_of
from schedule.strategies import schedules
from shardwise.errors import ScheduleError
from shardwise.schedule import (
    Action,
    Costs,
    Edges,
    Kind,
    Schedule,
    StageKind,
    Transfer,
    TransferKind,
    generate,
    seconds_of,
    simulate,
    with_transfers,
)

FORWARD = Costs(compute_seconds={Kind.F: (1.0, 1.0)}, activation_seconds={(0, 1): 4.0})


def times(schedule: Schedule, costs: Costs, *, prefetch: int = 2) -> dict[str, tuple[float, float]]:
    spans = simulate(schedule, costs=costs, prefetch=prefetch).spans
    return {str(span.action): (span.start_s, span.end_s) for span in spans}


def test_a_transfer_delays_its_reader_and_not_its_sender() -> None:
    assert times(schedule_of("0F0 0F1", "1F0 1F1"), FORWARD) == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "0S1F0": (1, 5),
        "0S1F1": (5, 9),  # one after another on one link
        "1F0": (5, 6),
        "1F1": (9, 10),
    }


def test_without_prefetch_a_value_leaves_only_when_its_reader_is_next() -> None:
    late = times(schedule_of("0F0 0F1", "1F0 1F1"), FORWARD, prefetch=0)
    assert late["0S1F1"] == (6, 10)
    assert late["1F1"] == (10, 11)


def test_the_two_directions_of_a_pair_do_not_wait_for_each_other() -> None:
    schedule = schedule_of("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")
    costs = replace(Costs.uniform(2), activation_seconds={(0, 1): 3.0}, gradient_seconds={(0, 1): 5.0})
    found = times(schedule, costs)
    assert found["0S1F1"] == (4, 7)
    assert found["1S0B0"] == (7, 12)
    assert found["1S0B1"] == (12, 17)


def test_a_smaller_micro_batch_costs_less_everywhere() -> None:
    costs = replace(FORWARD, micro_batch_factors=(1.0, 0.5))
    found = times(schedule_of("0F0 0F1", "1F0 1F1"), costs)
    assert found["0S1F1"] == (5, 7)
    assert found["1F1"] == (7, 7.5)


def test_filling_the_bubble_with_weight_gradients_makes_a_step_shorter() -> None:
    whole = schedule_of("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")
    split = schedule_of("0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1F1 1I1 1W0 1W1")
    costs = Costs.uniform(2)
    assert simulate(whole, costs=costs).seconds == 9
    assert simulate(split, costs=costs).seconds == 7


@given(schedules(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_every_time_is_the_longest_path_that_leads_to_it(
    made: tuple[Schedule, Edges], prefetch: int, random: Random
) -> None:
    schedule, edges = made
    stages = range(schedule.num_stages)
    costs = Costs(
        compute_seconds={kind: tuple(float(random.randrange(4)) for _ in stages) for kind in Kind},
        activation_seconds={edge: float(random.randrange(4)) for edge in edges},
        gradient_seconds={edge: float(random.randrange(4)) for edge in edges},
        micro_batch_factors=tuple(float(random.randrange(1, 3)) for _ in range(schedule.num_micro_batches)),
    )
    timeline = simulate(schedule, edges, costs=costs, prefetch=prefetch)
    found = {str(span.action): (span.start_s, span.end_s) for span in timeline.spans}
    assert found == _longest_paths(schedule, edges, costs, prefetch)
    assert seconds_of(schedule, costs, edges, prefetch=prefetch) == timeline.seconds


def _longest_paths(schedule: Schedule, edges: Edges, costs: Costs, prefetch: int) -> dict[str, tuple[float, float]]:
    """By recursion from each action to all it waits for."""
    rows = with_transfers(schedule, edges, prefetch=prefetch)
    owners = schedule.owners
    items = {str(item): (r, i) for r, row in enumerate(rows) for i, item in enumerate(row)}
    links: dict[tuple[int, int], list[Transfer]] = {}
    for row in rows:
        for item in row:
            if isinstance(item, Transfer) and item.kind is TransferKind.SEND:
                links.setdefault((owners[item.source], owners[item.target]), []).append(item)

    def reached(item: Action | Transfer) -> float:
        """When the rank of `item` gets to it."""
        r, i = items[str(item)]
        before = [other for other in rows[r][:i] if isinstance(other, Action)]
        return span(before[-1])[1] if before else 0.0

    @cache
    def span(item: Action | Transfer) -> tuple[float, float]:
        factor = costs.micro_batch_factors[item.micro_batch]
        if isinstance(item, Action):
            start_s = max([reached(item), *(available(*value, item.micro_batch) for value in inputs(item))])
            return start_s, start_s + costs.compute_seconds[item.kind][item.stage] * factor
        on_link = links[owners[item.source], owners[item.target]]
        place = on_link.index(item)
        free_s = span(on_link[place - 1])[1] if place else 0.0
        start_s = max(reached(item), reached(replace(item, kind=TransferKind.RECV)), free_s)
        seconds = costs.gradient_seconds if item.gradient else costs.activation_seconds
        return start_s, start_s + seconds[item.edge] * factor

    def inputs(action: Action) -> list[tuple[int, int]]:
        """(source, target) of what it reads from other stages; its own stage's is earlier in its row."""
        if action.kind is Kind.F:
            return [(s, t) for s, t in edges if t == action.stage]
        return [(t, s) for s, t in edges if s == action.stage] if action.kind is not Kind.W else []

    def available(source: int, target: int, m: int) -> float:
        if owners[source] != owners[target]:
            send = Transfer(
                kind=TransferKind.SEND, source=source, target=target, micro_batch=m, gradient=source > target
            )
            return span(send)[1]
        kinds = [Kind.F] if source < target else [Kind.B, Kind.I]
        made = [Action(kind=kind, stage=source, micro_batch=m) for kind in kinds]
        return next(span(action)[1] for action in made if str(action) in items)

    ours = [item for row in rows for item in row if isinstance(item, Action)]
    return {str(item): span(item) for item in (*ours, *(t for sent in links.values() for t in sent))}


def test_many_stages_and_micro_batches_keep_the_bubble_of_the_formula() -> None:
    schedule = generate("1f1b", num_ranks=128, num_micro_batches=256)
    timeline = simulate(schedule, costs=Costs.uniform(128))
    assert timeline.bubble_fraction == pytest.approx(127 / (256 + 127))


@pytest.mark.parametrize(
    "costs, message",
    [
        (Costs(compute_seconds={}), "each of 2 stages, but F has 0; give compute_seconds"),
        (Costs.uniform(3), "each of 2 stages, but B has 3"),
        (replace(FORWARD, beside_seconds={StageKind.G: (1.0,)}), r"G has 1; give beside_seconds\[StageKind.G\] 2"),
        (replace(FORWARD, activation_seconds={(0, 2): 1.0}), r"activation_seconds .* lacks \(0, 1\)"),
        (replace(FORWARD, gradient_seconds={(1, 0): 1.0}), r"gradient_seconds .* lacks \(0, 1\)"),
        (replace(FORWARD, micro_batch_factors=(1.0,)), "each of 2 micro-batches or for none, but found 1"),
    ],
)
def test_costs_that_do_not_fit_the_schedule_are_refused(costs: Costs, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        simulate(schedule_of("0F0 0F1", "1F0 1F1"), costs=costs)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_no_duration_are_refused(seconds: float) -> None:
    with pytest.raises(ScheduleError, match="F actions have"):
        Costs(compute_seconds={Kind.F: (seconds,)})
    with pytest.raises(ScheduleError, match="U actions have"):
        Costs(compute_seconds={}, beside_seconds={StageKind.U: (seconds,)})
    with pytest.raises(ScheduleError, match="gradients have"):
        Costs(compute_seconds={}, gradient_seconds={(0, 1): seconds})


def test_a_deadlock_is_an_error_and_not_an_endless_simulation() -> None:
    with pytest.raises(ScheduleError, match="none can go on: rank 0 waits at 0B0"):
        simulate(schedule_of("0F0 0B0 0F1 0B1", "1F1 1F0 1B1 1B0"), costs=Costs.uniform(2))


def test_waiting_for_what_nobody_runs_is_named() -> None:
    with pytest.raises(ScheduleError, match="rank 1 waits at 1F1 for 0F1, which rank 0 never runs"):
        simulate(schedule_of("0F0", "1F0 1F1"), costs=Costs.uniform(2))
