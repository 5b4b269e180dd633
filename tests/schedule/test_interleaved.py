"""Interleaved 1F1B has a bubble smaller by the stages of a rank, for any number of micro-batches."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Costs, check, interleaved, simulate


def test_it_looks_like_its_picture() -> None:
    assert picture_of(interleaved.generate(num_ranks=3, num_micro_batches=6)) == picture_in(interleaved)


@pytest.mark.parametrize("p, m, v", [(1, 3, 2), (2, 2, 2), (3, 6, 2), (4, 8, 3), (4, 16, 2), (8, 32, 4)])
def test_bubble_and_peak_are_those_of_the_paper(p: int, m: int, v: int) -> None:
    schedule = interleaved.generate(num_ranks=p, num_micro_batches=m, chunks=v)
    timeline = simulate(schedule, costs=Costs.uniform(p * v))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1))
    assert check(schedule).peak_per_rank == tuple(min(v * p + p - 1 - 2 * r, v * m) for r in range(p))


@pytest.mark.parametrize("p, m", [(2, 5), (3, 7), (4, 9), (4, 11), (8, 19)])
def test_rounds_that_are_not_full_add_nothing_to_the_bubble(p: int, m: int) -> None:
    timeline = simulate(interleaved.generate(num_ranks=p, num_micro_batches=m), costs=Costs.uniform(2 * p))
    assert timeline.seconds == 3 * (2 * m + p - 1)
