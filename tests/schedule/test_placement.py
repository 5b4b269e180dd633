"""Stages over ranks: in a loop, or as a V."""

from __future__ import annotations

import pytest

from shardwise.errors import ScheduleError
from shardwise.schedule import Placement, chunks_of, placement, stages_of_ranks


def test_a_loop_goes_round_the_ranks_again() -> None:
    assert stages_of_ranks(Placement.LOOP, num_ranks=4, chunks=2) == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_a_v_comes_back_the_way_it_went() -> None:
    assert stages_of_ranks(Placement.V, num_ranks=4, chunks=2) == ((0, 7), (1, 6), (2, 5), (3, 4))


def test_a_schedule_made_for_one_stage_a_rank_refuses_two() -> None:
    assert placement("1f1b", num_ranks=2) == ((0,), (1,))
    assert chunks_of("1f1b") == 1
    with pytest.raises(ScheduleError, match="1f1b is made for 1 stages a rank, but chunks=2; write chunks=1"):
        placement("1f1b", num_ranks=2, chunks=2)


def test_counts_below_1_are_refused() -> None:
    with pytest.raises(ScheduleError, match="0 ranks and 2 stages a rank"):
        stages_of_ranks(Placement.V, num_ranks=0, chunks=2)
