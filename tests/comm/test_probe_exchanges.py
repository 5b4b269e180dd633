"""Exchanges are measured by every kind, size, group and way that there is, with the same calls on every rank."""

from __future__ import annotations

import pytest

from shardwise.comm.probe_exchanges import exchange_seconds_of_all, hidden_share
from shardwise.describe.kernels import ExchangeKind
from shardwise.testing import on_ranks


@on_ranks(4)
def test_groups_of_two_and_four_exchange_in_all_ways(rank) -> None:
    sizes = (1 << 10, 1 << 14)
    found = exchange_seconds_of_all(sizes, window_s=1e-3)
    assert all(each.seconds > 0 for each in found)
    collective = {(each.kind, each.group, each.nbytes) for each in found if each.kind is not ExchangeKind.SEND}
    kinds = set(ExchangeKind) - {ExchangeKind.SEND}
    assert collective == {(kind, group, size) for kind in kinds for group in (2, 4) for size in sizes}
    used = {each.way for each in found if each.chosen}
    assert used == {"shared memory", "shared memory, in place"}
    assert {each.way for each in found if not each.chosen} == {"gloo"}
    assert {(each.nbytes, each.way) for each in found if each.kind is ExchangeKind.SEND} == {
        (size, way) for size in sizes for way in ("shared memory", "gloo")
    }


@on_ranks(3)
def test_an_odd_rank_has_no_peer_and_waits_for_the_others(rank) -> None:
    found = exchange_seconds_of_all((1 << 10,), window_s=1e-3, all_ways=False)
    assert {each.group for each in found} == {2, 3}
    assert [each.kind for each in found if each.group == 2] == [ExchangeKind.SEND]
    assert {each.nbytes for each in found if each.group == 3} == {1020}  # a whole number of parts
    assert all(each.chosen for each in found)


@on_ranks(2)
@pytest.mark.parametrize("all_ways", [False, True])
def test_ways_that_programs_do_not_use_are_left_out_if_wanted(rank, all_ways) -> None:
    found = exchange_seconds_of_all((1 << 10,), window_s=1e-4, all_ways=all_ways)
    assert any(each.way == "gloo" for each in found) is all_ways


@on_ranks(2)
def test_what_products_hide_of_an_exchange_is_a_share(rank) -> None:
    assert 0 <= hidden_share(1 << 16, window_s=1e-3) <= 1
