"""Every way of dividing data is one device, beside every other axis and in every use; a broken one is not.

The cases are generated (`benchmarks.matrix`); here run as few as have every pair of what they combine, the whole matrix
is `make verify-all`.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from benchmarks.matrix.cases import BESIDE, DATA, USES, Case, all_cases, covering_cases
from benchmarks.matrix.side import CLIP, TOLERANCE, Plans, plans_for, run_case
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

COVERING = covering_cases()


@pytest.fixture(scope="module")
def plans() -> Plans:
    return plans_for(COVERING)


def of_size(size: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in COVERING if case.world_size == size], ids=str)


def test_the_whole_matrix_has_every_combination_once() -> None:
    cases = all_cases()
    assert len(set(cases)) == len(cases) == len(DATA) * len(BESIDE) * len(USES)
    assert {case.world_size for case in cases} == {2, 4, 8}
    assert len({str(case) for case in cases}) == len(cases)


def test_the_covering_cases_have_every_pair() -> None:
    told = [(case.data, case.beside, case.use) for case in COVERING]
    for first, second in itertools.combinations(range(3), 2):
        values = [tuple(DATA), tuple(BESIDE), USES]
        assert {(each[first], each[second]) for each in told} == set(itertools.product(values[first], values[second]))
    assert len(told) == len(DATA) * len(BESIDE)  # as few as can be


def check(rank: RankContext, case: Case, plans: Plans) -> None:
    result = run_case(rank, case, plans)
    assert result.missing == ()
    assert result.worst <= TOLERANCE
    assert result.smallest_norm > CLIP  # clipping means something


@on_ranks(2, timeout_s=60.0)
@of_size(2)
def test_two_ranks_are_one_device(rank: RankContext, case: Case, plans: Plans) -> None:
    check(rank, case, plans)


@on_ranks(4, timeout_s=60.0)
@of_size(4)
def test_four_ranks_are_one_device(rank: RankContext, case: Case, plans: Plans) -> None:
    check(rank, case, plans)


@on_ranks(8, timeout_s=100.0)
@of_size(8)
def test_eight_ranks_are_one_device(rank: RankContext, case: Case, plans: Plans) -> None:
    check(rank, case, plans)


def do_not_sum_gradients(program: Program) -> None:
    """Every replica, context and part keeps the gradients that it has computed."""
    program._gradients = None


def do_not_gather_updates(program: Program) -> None:
    """Ranks go on with the values that they updated themselves, beside old ones of the others."""
    program.__dict__["updated"] = lambda: None


def clip_by_the_own_norm(program: Program) -> None:
    """Every rank takes the norm of its own gradients for that of all."""
    program.__dict__["gradient_norm"] = lambda: float(program._own_squares().sqrt())


def update_a_part_twice(program: Program) -> None:
    """Part 1 believes to be part 0 of what it updates."""
    divided = program._divided_states
    assert divided is not None
    for bucket in divided.buckets:
        bucket.states.update({name: dataclasses.replace(each, start=0) for name, each in bucket.states.items()})


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize("data", ["dp2", "zero1"])
def test_gradients_that_are_not_summed_show(rank: RankContext, data: str, plans: Plans) -> None:
    case = Case(data=data, beside="alone", use="plain")
    assert run_case(rank, case, plans, change=do_not_sum_gradients).gradient > 1e-2


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize("data", ["zero1", "zero2"])
def test_updates_that_are_not_gathered_show(rank: RankContext, data: str, plans: Plans) -> None:
    case = Case(data=data, beside="alone", use="clipping")  # in shared memory everybody sees them
    result = run_case(rank, case, plans, change=do_not_gather_updates)
    assert min(result.weight, result.evaluation) > 100 * TOLERANCE


@on_ranks(2, timeout_s=60.0)
def test_a_norm_of_the_own_part_alone_shows(rank: RankContext, plans: Plans) -> None:
    result = run_case(rank, Case(data="zero3", beside="alone", use="clipping"), plans, change=clip_by_the_own_norm)
    assert result.norm > 1e-2
    assert result.weight > 1e-2


@on_ranks(2, timeout_s=60.0)
def test_elements_that_nobody_updates_show(rank: RankContext, plans: Plans) -> None:
    result = run_case(rank, Case(data="zero2", beside="alone", use="plain"), plans, change=update_a_part_twice)
    assert result.missing
    assert not result.worst <= TOLERANCE
