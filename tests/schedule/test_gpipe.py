"""GPipe has the bubble of its paper and keeps every micro-batch in flight."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Costs, check, gpipe, simulate


def test_it_looks_like_its_picture() -> None:
    assert picture_of(gpipe.generate(num_ranks=4, num_micro_batches=4)) == picture_in(gpipe)


@pytest.mark.parametrize("p, m", [(1, 1), (1, 4), (2, 1), (3, 2), (4, 8), (8, 32)])
def test_bubble_and_peak_are_those_of_the_paper(p: int, m: int) -> None:
    schedule = gpipe.generate(num_ranks=p, num_micro_batches=m)
    timeline = simulate(schedule, costs=Costs.uniform(p))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
    assert check(schedule).peak_per_rank == (m,) * p
