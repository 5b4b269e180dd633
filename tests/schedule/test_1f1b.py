"""1F1B has GPipe's bubble and keeps no more micro-batches in flight than there are stages to come."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Costs, check, one_f_one_b, simulate


def test_four_stages_and_eight_micro_batches_look_like_this() -> None:
    schedule = one_f_one_b.generate(num_ranks=4, num_micro_batches=8)
    assert picture_of(schedule) == (
        "rank 0  0>1>2>3>............0<<<4>1<<<5>2<<<6>3<<<7>4<<<..5<<<..6<<<..7<<<\n"
        "rank 1  ..0>1>2>........0<<<3>1<<<4>2<<<5>3<<<6>4<<<7>5<<<..6<<<..7<<<....\n"
        "rank 2  ....0>1>....0<<<2>1<<<3>2<<<4>3<<<5>4<<<6>5<<<7>6<<<..7<<<........\n"
        "rank 3  ......0>0<<<1>1<<<2>2<<<3>3<<<4>4<<<5>5<<<6>6<<<7>7<<<............"
    )
    assert picture_in(one_f_one_b) == picture_of(schedule)


@pytest.mark.parametrize("p, m", [(1, 1), (1, 4), (2, 1), (3, 2), (4, 3), (4, 8), (8, 32)])
def test_bubble_and_peak_are_those_of_the_papers(p: int, m: int) -> None:
    schedule = one_f_one_b.generate(num_ranks=p, num_micro_batches=m)
    timeline = simulate(schedule, costs=Costs.uniform(p))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
    assert check(schedule).peak_per_stage == tuple(min(p - s, m) for s in range(p))
