"""Every schedule is one device, alone and composed with what a pipeline is composed with; a broken one is not.

The cases are generated (`benchmarks.schedules.matrix`); here run those that cover every schedule and every composition,
the whole matrix is `python -m benchmarks.schedules.matrix`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.schedules.matrix.cases import COMPOSITIONS, Case, all_cases, covering_cases
from benchmarks.schedules.matrix.side import TOLERANCE, run_case
from shardwise.errors import DataflowError
from shardwise.execute.program import Program
from shardwise.launch import RankContext, RankPool, RankStarter
from shardwise.schedule import Action, Kind
from shardwise.schedule.transfers import Row
from shardwise.testing import on_ranks

COVERING = covering_cases()
V = Case(schedule="zb-v", chunks=2, pp=2, composition="alone")


def of_size(size: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in COVERING if case.world_size == size], ids=str)


def test_the_covering_cases_have_every_schedule_and_every_composition() -> None:
    assert {case.schedule for case in COVERING} == {case.schedule for case in all_cases()}
    assert {case.composition for case in COVERING} == set(COMPOSITIONS)


@on_ranks(2, timeout_s=60.0)
@of_size(2)
def test_a_schedule_on_two_ranks_is_one_device(rank: RankContext, case: Case) -> None:
    assert run_case(rank, case).worst <= TOLERANCE


@on_ranks(4, timeout_s=60.0)
@of_size(4)
def test_a_schedule_on_four_ranks_is_one_device(rank: RankContext, case: Case) -> None:
    assert run_case(rank, case).worst <= TOLERANCE


def first_w(row: Row) -> int:
    return next(i for i, each in enumerate(row) if isinstance(each, Action) and each.kind is Kind.W)


def run_another_row(program: Program, edit: Callable[[Row], Row]) -> None:
    """Rank 0 runs another row than the one that was checked."""
    row = program.row(V.micro_batches)
    ((key, _),) = program._rows.items()
    program._rows[key] = edit(row) if program.place.rank == 0 else row


def leave_a_w_out(program: Program) -> None:
    run_another_row(program, lambda row: (*row[: first_w(row)], *row[first_w(row) + 1 :]))


def take_the_w_of_another_micro_batch(program: Program) -> None:
    def edit(row: Row) -> Row:
        wrong = row[first_w(row)]
        assert isinstance(wrong, Action)
        other = Action(kind=Kind.W, stage=wrong.stage, micro_batch=wrong.micro_batch + 1)
        return (*row[: first_w(row)], other, *row[first_w(row) + 1 :])

    run_another_row(program, edit)


def sum_no_gradients(program: Program) -> None:
    program._gradients = None


@on_ranks(2, timeout_s=60.0)
def test_a_weight_gradient_that_is_left_out_shows(rank: RankContext) -> None:
    error = run_case(rank, V, change=leave_a_w_out).gradient
    assert error > 1e-2 if rank.rank == 0 else error > 0  # later steps start from other weights


def test_a_weight_gradient_of_another_micro_batch_is_no_gradient_that_waits(starter: RankStarter) -> None:
    with RankPool(2, starter=starter, num_threads=1) as pool, pytest.raises((KeyError, DataflowError)):
        pool.run(partial(run_case, change=take_the_w_of_another_micro_batch), V, timeout_s=60.0)


@on_ranks(4, timeout_s=60.0)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_replicas_that_do_not_sum_gradients_show(rank: RankContext, schedule: str) -> None:
    case = replace(V, schedule=schedule, chunks=2 if schedule == "zb-v" else 1, composition="dp2")
    assert run_case(rank, case, change=sum_no_gradients).gradient > 1e-2
