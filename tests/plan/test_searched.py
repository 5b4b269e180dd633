"""A schedule that is searched for a profile is at least as good as those in books, on the stages of the layout."""

from __future__ import annotations

import pytest

from hand_profiles import chain
from shardwise.layout import Layout
from shardwise.plan.partition import place
from shardwise.plan.searched import find_schedule
from shardwise.schedule import check

UNEVEN = chain([10**6, 10**6, 10**6, 3 * 10**6])


def found(layout: Layout, **more):
    return find_schedule(UNEVEN, layout, place(UNEVEN, layout), num_micro_batches=6, flops_per_s=1e6, **more)


@pytest.mark.parametrize("chunks", [1, 2])
def test_it_is_never_slower_than_a_textbook_one(chunks) -> None:
    searched = found(Layout(pp=2, schedule="searched", chunks=chunks))
    assert searched.searched.best_textbook is not None
    name, seconds = searched.searched.best_textbook
    assert searched.searched.lower_bound_s <= searched.searched.seconds <= seconds
    assert (searched.schedule.num_ranks, searched.schedule.num_stages) == (2, 2 * chunks)
    check(searched.schedule)
    assert str(searched).startswith("searched: ")
    assert f"less than the best textbook one ({name}, " in str(searched)


def test_no_rank_keeps_more_than_twice_what_1f1b_keeps_on_its_first() -> None:
    searched = found(Layout(pp=2, schedule="searched"))
    assert max(check(searched.schedule).peak_per_rank) <= 4


def test_slow_links_are_paid_for() -> None:
    layout = Layout(pp=2, schedule="searched")
    assert found(layout, bytes_per_s=32.0).searched.seconds > found(layout).searched.seconds
