"""DualPipeV runs forwards beside backwards and leaves no more bubble than ZB-H1, in the memory of 1F1B and one."""

from __future__ import annotations

import pytest

from schedule.helpers import picture_in, picture_of
from shardwise.schedule import Costs, check, dualpipe_v, simulate, zb_v


def test_it_looks_like_its_picture() -> None:
    assert picture_of(dualpipe_v.generate(num_ranks=3, num_micro_batches=6)) == picture_in(dualpipe_v)


@pytest.mark.parametrize("p, m", [(1, 2), (2, 4), (3, 7), (4, 8), (8, 32)])
def test_bubble_and_peak_are_those_of_the_paper(p: int, m: int) -> None:
    schedule = dualpipe_v.generate(num_ranks=p, num_micro_batches=m)
    timeline = simulate(schedule, costs=Costs.uniform(2 * p))
    # (p-1)(t_FB + t_B - 3 t_W)/2 with t_F = t_I = t_W = 2 on a rank, t_FB = t_F + t_B: (p-1)(3 + 2 - 3)/2 in slots
    assert timeline.seconds == 6 * m + p - 1
    assert max(check(schedule).peak_per_rank) <= 2 * p + 1


@pytest.mark.parametrize("p, m", [(2, 1), (3, 2), (4, 4), (8, 8)])
def test_few_micro_batches_wait_no_longer_than_in_zb_v(p: int, m: int) -> None:
    costs = Costs.uniform(2 * p)
    ours, other = (
        simulate(g(num_ranks=p, num_micro_batches=m), costs=costs) for g in (dualpipe_v.generate, zb_v.generate)
    )
    assert ours.seconds <= other.seconds


def test_in_the_steady_phase_a_forward_stands_next_to_the_whole_backward_of_the_other_stage() -> None:
    row = dualpipe_v.generate(num_ranks=2, num_micro_batches=8).text_rows()[0]
    assert "0F3 3B1 3F2 0B0 0F4 3B2 3F3 0B1" in row
