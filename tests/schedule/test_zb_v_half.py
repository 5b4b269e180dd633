"""V-Half needs half the memory of 1F1B and leaves half of its bubble."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Costs, check, simulate, zb_v_half


def test_it_looks_like_its_picture() -> None:
    assert picture_of(zb_v_half.generate(num_ranks=4, num_micro_batches=6)) == picture_in(zb_v_half)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("times", [1, 2, 4])
def test_bubble_and_peak_are_those_of_the_paper(p: int, times: int) -> None:
    m = p * times
    schedule = zb_v_half.generate(num_ranks=p, num_micro_batches=m)
    timeline = simulate(schedule, costs=Costs.uniform(2 * p))
    assert timeline.seconds - 6 * m <= 3 * (p - 1)  # 1F1B waits 6 (p-1) such slots: half of it
    assert max(check(schedule).peak_per_rank) <= p + 2  # table 1: (p+2)/2 micro-batches of two stages
