"""ZB-H2 leaves no gap in the work of a rank, for nearly twice the memory of 1F1B."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Action, Costs, check, simulate, zb_h1, zb_h2


def test_it_looks_like_its_picture() -> None:
    assert picture_of(zb_h2.generate(num_ranks=4, num_micro_batches=8)) == picture_in(zb_h2)


@pytest.mark.parametrize("p, m", [(1, 1), (2, 3), (3, 5), (4, 8), (8, 32)])
def test_bubble_and_peak_are_those_of_the_paper(p: int, m: int) -> None:
    schedule = zb_h2.generate(num_ranks=p, num_micro_batches=m)
    timeline = simulate(schedule, costs=Costs.uniform(p))
    for r in range(p):
        spans = [span for span in timeline.spans if span.rank == r and isinstance(span.action, Action)]
        assert spans[-1].end_s - spans[0].start_s == 3 * m
    assert timeline.seconds == 3 * m + p - 1
    assert check(schedule).peak_per_rank == (2 * p - 1,) * p


@pytest.mark.parametrize("p, m", [(3, 3), (4, 4), (5, 7), (8, 8), (8, 14)])
def test_with_few_micro_batches_it_is_no_slower_than_zb_h1(p: int, m: int) -> None:
    costs = Costs.uniform(p)
    ours, other = (simulate(g(num_ranks=p, num_micro_batches=m), costs=costs) for g in (zb_h2.generate, zb_h1.generate))
    assert ours.seconds <= other.seconds
