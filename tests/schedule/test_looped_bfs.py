"""Looped breadth-first has the bubble of interleaved 1F1B and keeps every micro-batch in flight."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Costs, check, looped_bfs, simulate


def test_it_looks_like_its_picture() -> None:
    assert picture_of(looped_bfs.generate(num_ranks=3, num_micro_batches=4)) == picture_in(looped_bfs)


@pytest.mark.parametrize("p, m, v", [(1, 3, 2), (2, 2, 2), (3, 4, 2), (4, 9, 3), (8, 32, 4)])
def test_bubble_and_peak_are_those_of_the_paper(p: int, m: int, v: int) -> None:
    schedule = looped_bfs.generate(num_ranks=p, num_micro_batches=m, chunks=v)
    timeline = simulate(schedule, costs=Costs.uniform(p * v))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1))
    assert check(schedule).peak_per_rank == (v * m,) * p


def test_a_stage_works_through_all_micro_batches_at_once() -> None:
    assert looped_bfs.generate(num_ranks=2, num_micro_batches=2).text_rows()[1] == "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1"
