"""The list scheduler makes whole schedules within the limits, whatever its rules are."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.searches import Case, cases
from shardwise.schedule import Costs, check, draw, simulate
from shardwise.schedule.list_scheduler import Policy, dispatch
from shardwise.schedule.longest_path import times_of
from shardwise.schedule.memory import fits
from shardwise.schedule.policies import changed, first_policies
from shardwise.schedule.problem import FORWARD, INPUT, WEIGHT, WHOLE, Problem


@settings(deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_any_rule_makes_a_schedule_that_runs_and_fits(case: Case, seed: int) -> None:
    problem, chance = case.problem, random.Random(seed)
    policy = chance.choice(list(first_policies(problem)))
    for _ in range(3):
        rows = dispatch(problem, policy)
        schedule = problem.schedule(rows, "by rules")
        check(schedule, case.edges)
        assert fits(schedule, case.memory)
        policy = changed(policy, problem, chance)


@settings(deadline=None)
@given(cases(free=True), st.integers(0, 10**6))
def test_with_free_transfers_it_is_timed_as_the_simulator_does(case: Case, seed: int) -> None:
    problem = case.problem
    rows = dispatch(problem, random.Random(seed).choice(list(first_policies(problem))))
    times = times_of(problem, rows)
    assert times is not None
    timeline = simulate(problem.schedule(rows, "by rules"), case.edges, costs=case.costs)
    assert times.seconds == pytest.approx(timeline.seconds, rel=1e-12)


def backward_first(num_stages: int, *, put_off: int) -> Policy:
    """F when no backward is there, W when there is nothing else, at most as many ahead as 1F1B has."""
    base = {FORWARD: 0.0, INPUT: -1.0, WEIGHT: 1.0, WHOLE: -1.0}
    return Policy(
        base=tuple(base[kind] for kind in range(4) for _ in range(num_stages)),
        slope=(0.0,) * (4 * num_stages),
        ahead=tuple(num_stages - s for s in range(num_stages)),
        put_off=(put_off,) * num_stages,
        whole=(False,) * num_stages,
        patience=0.0,
    )


def picture(policy: Policy, *, num_stages: int, num_micro_batches: int) -> str:
    costs = Costs.uniform(num_stages)
    edges = frozenset((s, s + 1) for s in range(num_stages - 1))
    ranks = [(s,) for s in range(num_stages)]
    problem = Problem.of(costs, edges, num_micro_batches=num_micro_batches, ranks=ranks, memory=None)
    timeline = simulate(problem.schedule(dispatch(problem, policy), "by rules"), costs=costs)
    return draw(timeline).partition("\n\n")[0]


def test_weight_gradients_fill_the_bubbles_of_1f1b() -> None:
    assert (
        picture(backward_first(3, put_off=4), num_stages=3, num_micro_batches=4)
        == """\
rank 0  0>1>2>....0<3>1<0=2<1=3<2=3=
rank 1  ..0>1>..0<2>1<3>2<0=3<1=2=3=
rank 2  ....0>0<1>1<2>2<3>3<0=1=2=3="""
    )


def test_weight_gradients_that_may_not_be_put_off_follow_at_once() -> None:
    assert (
        picture(backward_first(3, put_off=0), num_stages=3, num_micro_batches=4)
        == """\
rank 0  0>1>2>....0<0=3>1<1=..2<2=..3<3=
rank 1  ..0>1>..0<0=2>1<1=3>2<2=..3<3=..
rank 2  ....0>0<0=1>1<1=2>2<2=3>3<3=...."""
    )
