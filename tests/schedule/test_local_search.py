"""Small moves make rows faster and break nothing; merging halves of a backward costs no time."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.helpers import schedule_of
from schedule.searches import Case, cases
from shardwise.schedule import Costs, Kind, chain, check, print_row
from shardwise.schedule.list_scheduler import dispatch
from shardwise.schedule.local_search import improve, merged
from shardwise.schedule.longest_path import times_of
from shardwise.schedule.memory import fits
from shardwise.schedule.policies import first_policies
from shardwise.schedule.problem import Problem, Rows


def seconds(problem: Problem, rows: Rows) -> float:
    times = times_of(problem, rows)
    assert times is not None
    return times.seconds


def improved(problem: Problem, rows: Rows, *, num_steps: int = 60, seed: int = 0) -> Rows:
    return improve(
        problem, rows, chance=random.Random(seed), heat=0.3, num_steps=num_steps, target=0.0, stop=lambda: False
    )


@settings(deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_moves_never_make_it_slower_nor_break_an_order_or_a_limit(case: Case, seed: int) -> None:
    problem = case.problem
    rows = dispatch(problem, random.Random(seed).choice(list(first_policies(problem))))
    better = improved(problem, rows, seed=seed)
    assert seconds(problem, better) <= seconds(problem, rows) * (1 + 1e-9)
    schedule = problem.schedule(better, "moved")
    check(schedule, case.edges)
    assert fits(schedule, case.memory)


@settings(deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_merging_costs_neither_time_nor_room(case: Case, seed: int) -> None:
    problem = case.problem
    rows = dispatch(problem, random.Random(seed).choice(list(first_policies(problem))))
    fewer = merged(problem, rows)
    assert seconds(problem, fewer) <= seconds(problem, rows) * (1 + 1e-9)
    assert sum(map(len, fewer)) <= sum(map(len, rows))
    schedule = problem.schedule(fewer, "merged")
    check(schedule, case.edges)
    assert fits(schedule, case.memory)


def test_a_late_gradient_is_moved_ahead() -> None:
    costs = Costs.uniform(2)
    problem = Problem.of(costs, chain(2), num_micro_batches=2, ranks=[(0,), (1,)], memory=None)
    late = problem.rows(schedule_of("0F0 0F1 0I0 0I1 0W0 0W1", "1F0 1F1 1I0 1W0 1I1 1W1"))
    # no later than rank 1 can: it begins at 1 s and works for 6
    assert seconds(problem, late) == 9
    assert seconds(problem, improved(problem, late, num_steps=400)) == 7


def test_only_halves_that_nobody_waits_between_are_merged() -> None:
    costs = Costs.uniform(2)
    problem = Problem.of(costs, chain(2), num_micro_batches=2, ranks=[(0,), (1,)], memory=None)
    rows = problem.rows(schedule_of("0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1W0 1F1 1I1 1W1"))
    schedule = problem.schedule(merged(problem, rows), "merged")
    assert print_row(schedule.actions[0]) == "0F0 0F1 0B0 0B1"
    assert Kind.I in {action.kind for action in schedule.actions[1]}  # rank 0 waits for them
