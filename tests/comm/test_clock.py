"""Clocks that started at other times, and run on other hosts, are told apart and set right."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.comm.clock import ClockOffset, Round, clock_offsets, host_of_clock, offset_of
from shardwise.errors import TransferError
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

seconds = st.floats(0, 1)


def one_round(*, offset_s: float, there_s: float, back_s: float, between_s: float = 0.0) -> Round:
    """A round as it would be seen if the other clock were ahead by `offset_s`."""
    t1_s = 10.0 + there_s + offset_s
    t3_s = 10.0 + there_s + between_s + back_s
    return Round(t0_s=10.0, t1_s=t1_s, t2_s=t1_s + between_s, t3_s=t3_s)


@given(st.floats(-1e4, 1e4), seconds, seconds, seconds)
def test_an_offset_is_wrong_by_half_a_round_trip_at_most(
    offset_s: float, there_s: float, back_s: float, between_s: float
) -> None:
    found = offset_of([one_round(offset_s=offset_s, there_s=there_s, back_s=back_s, between_s=between_s)])
    assert abs(found.offset_s - offset_s) <= (there_s + back_s) / 2 + 1e-9
    assert found.error_s == pytest.approx((there_s + back_s) / 2, abs=1e-9)


def test_equal_ways_give_the_offset_and_the_quickest_round_is_believed() -> None:
    slow = one_round(offset_s=5.0, there_s=0.9, back_s=0.1)
    quick = one_round(offset_s=5.0, there_s=0.02, back_s=0.02, between_s=3.0)  # the other took its time: no matter
    found = offset_of([slow, quick, slow])
    assert (found.offset_s, found.error_s) == pytest.approx((5.0, 0.02))
    assert offset_of([slow]).offset_s == pytest.approx(5.4)


def test_clocks_are_not_compared_without_a_round() -> None:
    with pytest.raises(TransferError, match="there are 0"):
        offset_of([])


def test_a_world_of_one_rank_has_one_clock() -> None:
    assert clock_offsets(0, 1) == (ClockOffset(),)


@on_ranks(3)
def test_ranks_of_one_host_share_its_clock_and_ask_nobody(rank: RankContext) -> None:
    assert clock_offsets(rank.rank, 3) == (ClockOffset(),) * 3
    assert host_of_clock() == host_of_clock()


@on_ranks(4)
def test_skewed_clocks_of_other_hosts_are_found(rank: RankContext) -> None:
    skew_s = (0.0, 0.0, 2000.0, 2000.0)[rank.rank]  # two hosts, two ranks each
    found = clock_offsets(
        rank.rank, 4, now=lambda: time.perf_counter() + skew_s, host=("here", "here", "there", "there")[rank.rank]
    )
    assert found[0] == found[1] == ClockOffset()
    assert found[2] == found[3]
    assert abs(found[2].offset_s - 2000.0) <= found[2].error_s < 0.05
    assert found[2].error_s > 0


@on_ranks(3)
def test_every_host_has_an_offset_of_its_own(rank: RankContext) -> None:
    skew_s = (7.0, -3.0, 0.25)[rank.rank]
    found = clock_offsets(rank.rank, 3, now=lambda: time.perf_counter() + skew_s, host=f"host {rank.rank}")
    for each, expected in zip(found, (0.0, -10.0, -6.75), strict=True):
        assert abs(each.offset_s - expected) <= each.error_s + 1e-9
