"""A searched schedule is never slower than a generator's, keeps every limit and can run."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.searches import Case, cases, costs_of
from shardwise.errors import ScheduleError
from shardwise.schedule import (
    GENERATORS,
    Costs,
    Kind,
    Placement,
    chain,
    check,
    generate,
    placement,
    seconds_of,
    simulate,
)
from shardwise.schedule.memory import Memory, fits, peak_bytes
from shardwise.schedule.placement import stages_of_ranks
from shardwise.schedule.search import Searched, search

UNEVEN = Costs(
    compute_seconds={
        Kind.F: (1.0, 2.0, 1.5, 4.0),
        Kind.I: (1.0, 2.0, 1.5, 4.0),
        Kind.W: (1.0, 1.5, 1.5, 3.0),
        Kind.B: (2.0, 3.5, 3.0, 7.0),
    },
    activation_seconds=dict.fromkeys(chain(4), 0.1),
    gradient_seconds=dict.fromkeys(chain(4), 0.1),
)
ONE_EACH = [(s,) for s in range(4)]


@settings(max_examples=40, deadline=None)
@given(cases())
def test_what_is_found_runs_fits_and_takes_as_long_as_it_says(case: Case) -> None:
    found = search(**case._asdict(), seconds=0.05)
    check(found.schedule, case.edges)
    assert fits(found.schedule, case.memory)
    assert simulate(found.schedule, case.edges, costs=case.costs).seconds == pytest.approx(found.seconds, rel=1e-12)
    assert found.lower_bound_s <= found.seconds * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_it_is_never_slower_than_a_generator_that_fits(data: st.DataObject) -> None:
    num_ranks, num_micro_batches = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    chunks, placed = data.draw(st.sampled_from([(1, Placement.LOOP), (2, Placement.LOOP), (2, Placement.V)]))
    ranks = stages_of_ranks(placed, num_ranks=num_ranks, chunks=chunks)
    num_stages = num_ranks * chunks
    costs = data.draw(costs_of(num_stages, num_micro_batches, chain(num_stages), free=False))
    limit = data.draw(st.sampled_from((None, 1.0, 1.5, 2.0)))
    limits = None if limit is None else (limit * chunks,) * num_ranks
    kept = (1.0,) * num_stages
    memory = Memory(activation_bytes=kept, weight_bytes=(0.5,) * num_stages, limit_bytes=limits)
    found = search(costs, num_micro_batches=num_micro_batches, ranks=ranks, memory=memory, seconds=0.05)
    assert fits(found.schedule, memory)
    for name, family in GENERATORS.items():
        fewest, most = family.chunks
        if not family.flushes or chunks < fewest or (most or chunks) < chunks:
            continue
        if placement(name, num_ranks=num_ranks, chunks=chunks) != ranks:
            continue
        other = generate(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=chunks)
        if fits(other, memory):
            assert found.seconds <= seconds_of(other, costs) * (1 + 1e-9), name
            assert found.best_textbook is not None
            assert found.best_textbook[1] <= seconds_of(other, costs) * (1 + 1e-9)


def uneven(num_micro_batches: int = 8, memory: Memory | None = None, seed: int = 0) -> Searched:
    return search(UNEVEN, num_micro_batches=num_micro_batches, ranks=ONE_EACH, memory=memory, seconds=0.2, seed=seed)


def limited(limit: float) -> Memory:
    return Memory(activation_bytes=(1.0,) * 4, weight_bytes=(0.5,) * 4, limit_bytes=(limit,) * 4)


def test_uneven_stages_take_what_the_busiest_rank_needs_and_no_more() -> None:
    found = uneven()
    # the last rank works 8 x 11 s, begins behind F on the three before it and their transfers
    assert found.lower_bound_s == pytest.approx(1.0 + 2.0 + 1.5 + 3 * 0.1 + 88)
    assert found.seconds == pytest.approx(found.lower_bound_s)


def test_under_a_limit_uneven_stages_are_faster_than_by_any_generator() -> None:
    found = uneven(memory=limited(2.0))
    assert found.best_textbook is not None
    assert found.seconds < 0.9 * found.best_textbook[1]


def test_a_seed_gives_one_schedule() -> None:
    assert uneven(memory=limited(2.0), seed=3) == uneven(memory=limited(2.0), seed=3)


@pytest.mark.parametrize("limit", [1.0, 1.5, 2.0, 3.0])
def test_less_memory_takes_longer_and_is_kept_to(limit: float) -> None:
    found = uneven(memory=limited(limit))
    assert max(peak_bytes(found.schedule, limited(limit))) <= limit
    assert found.seconds <= uneven(memory=limited(1.0)).seconds
    assert found.seconds >= uneven().seconds


def test_a_stage_that_cannot_split_keeps_its_backward_whole() -> None:
    costs = Costs(
        compute_seconds={Kind.F: (1.0, 1.0), Kind.I: (2.0, 1.0), Kind.W: (0.0, 1.0), Kind.B: (2.0, 2.0)},
    )
    found = search(costs, num_micro_batches=6, ranks=[(0,), (1,)])
    assert {action.kind for action in found.schedule.actions[0]} == {Kind.F, Kind.B}


def test_halves_that_nothing_comes_between_are_one_whole_backward() -> None:
    found = search(Costs.uniform(1), num_micro_batches=3, ranks=[(0,)])
    assert {action.kind for action in found.schedule.actions[0]} == {Kind.F, Kind.B}


def test_a_limit_without_room_for_one_micro_batch_is_refused_with_its_numbers() -> None:
    memory = Memory(activation_bytes=(3.0, 2.0), weight_bytes=(1.0, 1.0), limit_bytes=(None, 1.5))
    with pytest.raises(ScheduleError, match=r"stages \[1\] of rank 1 keep 2 and its limit is 1.5; raise the limit"):
        search(Costs.uniform(2), num_micro_batches=4, ranks=[(0,), (1,)], memory=memory)


def test_every_kind_needs_a_cost_on_every_stage() -> None:
    costs = Costs(compute_seconds={Kind.F: (1.0, 1.0), Kind.B: (2.0, 2.0)})
    with pytest.raises(ScheduleError, match=r"F, I, W and B cost on each of 2 stages, but I has 0 numbers"):
        search(costs, num_micro_batches=2, ranks=[(0,), (1,)])


def test_a_budget_of_nothing_still_gives_a_schedule() -> None:
    found = search(UNEVEN, num_micro_batches=8, ranks=ONE_EACH, seconds=0.0)
    check(found.schedule)
    assert found.best_textbook is not None
    assert found.seconds <= found.best_textbook[1]


def test_a_rank_may_own_any_stages() -> None:
    chance = random.Random(0)
    costs = Costs.uniform(5)
    found = search(costs, num_micro_batches=chance.randint(3, 6), ranks=[(0, 3, 4), (1,), (2,)])
    check(found.schedule)
    assert found.best_textbook is None
