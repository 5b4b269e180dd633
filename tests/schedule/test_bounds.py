"""The lower bound is below every schedule, and equals what is plain by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.searches import Case, cases
from shardwise.schedule import Costs, Kind, chain, seconds_of
from shardwise.schedule.bounds import lower_bound
from shardwise.schedule.list_scheduler import dispatch
from shardwise.schedule.memory import Memory
from shardwise.schedule.policies import first_policies
from shardwise.schedule.problem import Problem


def problem_of(
    *seconds: tuple[float, float, float], num_micro_batches: int, memory: Memory | None = None, lag: float = 0.0
) -> Problem:
    """A chain of stages with (F, I, W) each, one a rank."""
    forward, back, late = zip(*seconds, strict=True)
    edges = chain(len(seconds))
    costs = Costs(
        compute_seconds={
            Kind.F: forward,
            Kind.I: back,
            Kind.W: late,
            Kind.B: tuple(i + w for i, w in zip(back, late, strict=True)),
        },
        activation_seconds=dict.fromkeys(edges, lag),
        gradient_seconds=dict.fromkeys(edges, lag),
    )
    ranks = [(s,) for s in range(len(seconds))]
    return Problem.of(costs, edges, num_micro_batches=num_micro_batches, ranks=ranks, memory=memory)


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_no_schedule_is_below_the_bound(case: Case, chance: object) -> None:
    problem = case.problem
    for policy in list(first_policies(problem))[::29]:
        schedule = problem.schedule(dispatch(problem, policy), "by rules")
        assert seconds_of(schedule, case.costs, case.edges) >= lower_bound(problem) * (1 - 1e-9)


def test_one_micro_batch_takes_its_way_there_and_back() -> None:
    # 1 + 2 up, 3 + 5 down, and the last weight gradient, which is the first stage's
    assert lower_bound(problem_of((1, 3, 4), (2, 5, 1), num_micro_batches=1)) == pytest.approx(1 + 2 + 5 + 3 + 4)
    assert lower_bound(problem_of((1, 3, 4), (2, 5, 1), num_micro_batches=1, lag=0.5)) == pytest.approx(15 + 2 * 0.5)


def test_the_busiest_rank_works_without_a_gap_once_it_has_begun() -> None:
    # rank 1 starts after 1 s, works 10 x 9 s; its last weight gradient hides the way back
    assert lower_bound(problem_of((1, 1, 1), (3, 3, 3), num_micro_batches=10)) == pytest.approx(1 + 90)


def test_a_limit_of_one_micro_batch_leaves_nothing_to_overlap_but_weight_gradients() -> None:
    memory = Memory(activation_bytes=(1.0, 1.0), weight_bytes=(0.0, 0.0), limit_bytes=(1.0, 1.0))
    # rank 0 runs F, waits for rank 1's F and I, runs I; its weight gradients fill the waiting but for the last
    limited = problem_of((1, 1, 1), (1, 1, 1), num_micro_batches=5, memory=memory)
    assert lower_bound(limited) == pytest.approx(5 * 4 + 1)
    assert lower_bound(problem_of((1, 1, 1), (1, 1, 1), num_micro_batches=5)) == pytest.approx(5 * 3 + 1)
