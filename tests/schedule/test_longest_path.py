"""The search's own clock is the simulator's, and says early that a limit is passed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.helpers import schedule_of
from schedule.searches import Case, cases
from shardwise.schedule import Costs, Kind, chain, seconds_of
from shardwise.schedule.list_scheduler import dispatch
from shardwise.schedule.longest_path import times_of
from shardwise.schedule.policies import first_policies
from shardwise.schedule.problem import Problem

COSTS = Costs(
    compute_seconds={Kind.F: (1.0, 2.0), Kind.I: (1.0, 3.0), Kind.W: (1.0, 0.5), Kind.B: (1.5, 3.5)},
)


def problem_of(costs: Costs = COSTS, num_micro_batches: int = 2) -> Problem:
    return Problem.of(costs, chain(2), num_micro_batches=num_micro_batches, ranks=[(0,), (1,)], memory=None)


@settings(deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_it_is_never_above_the_simulator_which_also_waits_for_links(case: Case, seed: int) -> None:
    problem = case.problem
    rows = dispatch(problem, random.Random(seed).choice(list(first_policies(problem))))
    times = times_of(problem, rows)
    assert times is not None
    assert times.seconds <= seconds_of(problem.schedule(rows, "by rules"), case.costs, case.edges) * (1 + 1e-9)


def test_halves_of_unequal_micro_batches_cost_what_theirs_do() -> None:
    schedule = schedule_of("0F0 0F1 0B0 0I1 0W1", "1F0 1B0 1F1 1I1 1W1")  # on rank 0, the only W is of micro-batch 1
    costs = replace(COSTS, micro_batch_factors=(1.0, 0.25))
    problem = problem_of(costs)
    rows = problem.rows(schedule)
    times = times_of(problem, rows)
    assert times is not None
    assert times.seconds == seconds_of(schedule, costs)
    assert problem.schedule(rows, schedule.name) == schedule


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_limit_that_is_passed_gives_nothing(share: float) -> None:
    problem = problem_of()
    rows = problem.rows(schedule_of("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"))
    times = times_of(problem, rows)
    assert times is not None
    assert times_of(problem, rows, limit=times.seconds) == times
    limited = times_of(problem, rows, limit=share * times.seconds)
    assert limited is None or limited.seconds > share * times.seconds


def test_ranks_that_wait_for_each_other_have_no_times() -> None:
    problem = problem_of()
    letters = problem.rows(schedule_of("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"))
    letters[0] = [letters[0][0], letters[0][2], letters[0][1], letters[0][3]]  # F B F B, fine on a chain of two
    assert times_of(problem, letters) is not None
    backward_first = [[letters[0][1], *letters[0][:1], *letters[0][2:]], letters[1]]
    assert times_of(problem, backward_first) is None
