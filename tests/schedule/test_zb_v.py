"""ZB-V leaves no gap in the work of a rank, in the memory of 1F1B."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Action, Costs, check, simulate, zb_v


def test_it_looks_like_its_picture() -> None:
    assert picture_of(zb_v.generate(num_ranks=3, num_micro_batches=6)) == picture_in(zb_v)


@pytest.mark.parametrize("p, m", [(1, 1), (2, 3), (3, 5), (3, 12), (4, 7), (8, 32)])
def test_bubble_and_peak_are_those_of_the_paper(p: int, m: int) -> None:
    schedule = zb_v.generate(num_ranks=p, num_micro_batches=m)
    timeline = simulate(schedule, costs=Costs.uniform(2 * p))
    for r in range(p):
        spans = [span for span in timeline.spans if span.rank == r and isinstance(span.action, Action)]
        assert spans[-1].end_s - spans[0].start_s == 6 * m
    assert timeline.seconds == 6 * m + p - 1
    assert check(schedule).peak_per_rank == (2 * p,) * p


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_as_many_micro_batches_as_ranks_wait_no_longer_than_many(p: int) -> None:
    assert (
        simulate(zb_v.generate(num_ranks=p, num_micro_batches=p), costs=Costs.uniform(2 * p)).seconds == 6 * p + p - 1
    )


@pytest.mark.parametrize("p, m", [(2, 1), (2, 2), (3, 3), (4, 2), (8, 8), (8, 12)])
def test_with_few_micro_batches_the_memory_still_suffices(p: int, m: int) -> None:
    assert max(check(zb_v.generate(num_ranks=p, num_micro_batches=m)).peak_per_rank) <= min(2 * p, 2 * m)
