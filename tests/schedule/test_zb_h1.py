"""ZB-H1 has a third of the bubble of 1F1B in the same memory."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Costs, Kind, check, simulate, zb_h1


def test_it_looks_like_its_picture() -> None:
    assert picture_of(zb_h1.generate(num_ranks=4, num_micro_batches=8)) == picture_in(zb_h1)


@pytest.mark.parametrize("p, m, v", [(1, 1, 1), (2, 2, 1), (3, 12, 1), (4, 4, 1), (8, 32, 1), (4, 8, 2), (3, 9, 3)])
def test_bubble_and_peak_are_those_of_the_paper(p: int, m: int, v: int) -> None:
    schedule = zb_h1.generate(num_ranks=p, num_micro_batches=m, chunks=v)
    timeline = simulate(schedule, costs=Costs.uniform(p * v))
    assert timeline.seconds == 3 * v * m + (p - 1)  # (p-1)(t_F + t_I - t_W)/v, where F = I = W = 1 on a stage
    assert check(schedule).peak_per_rank == (v * p,) * p


@pytest.mark.parametrize("forward, backward, weight", [(2.0, 2.0, 1.0), (3.0, 4.0, 2.0), (2.0, 3.0, 1.0)])
def test_the_bubble_shrinks_with_the_weight_gradient(forward: float, backward: float, weight: float) -> None:
    p, m = 4, 8
    each = {Kind.F: forward, Kind.I: backward, Kind.W: weight}
    costs = Costs(compute_seconds={kind: (seconds,) * p for kind, seconds in each.items()})
    timeline = simulate(zb_h1.generate(num_ranks=p, num_micro_batches=m), costs=costs)
    assert timeline.seconds == m * sum(each.values()) + (p - 1) * (forward + backward - weight)


def test_fewer_micro_batches_than_ranks_wait_no_longer_than_they_must() -> None:
    for p, m in [(2, 1), (4, 1), (4, 2), (8, 3)]:
        timeline = simulate(zb_h1.generate(num_ranks=p, num_micro_batches=m), costs=Costs.uniform(p))
        assert timeline.seconds == 2 * p + 2 * m - 1 if m < p else 3 * m + p - 1
