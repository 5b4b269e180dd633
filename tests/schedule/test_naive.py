"""The naive schedule keeps one micro-batch in flight and one rank busy."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Costs, check, naive, simulate


def test_it_looks_like_its_picture() -> None:
    assert picture_of(naive.generate(num_ranks=3, num_micro_batches=2)) == picture_in(naive)


@pytest.mark.parametrize("num_stages, num_micro_batches", [(1, 1), (2, 3), (4, 8)])
def test_all_ranks_but_one_are_idle(num_stages: int, num_micro_batches: int) -> None:
    schedule = naive.generate(num_ranks=num_stages, num_micro_batches=num_micro_batches)
    timeline = simulate(schedule, costs=Costs.uniform(num_stages))
    assert timeline.seconds == 3 * num_stages * num_micro_batches
    assert timeline.bubble_fraction == pytest.approx((num_stages - 1) / num_stages)
    assert check(schedule).peak_per_rank == (1,) * num_stages
