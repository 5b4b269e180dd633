"""Seconds of collectives on round links: 100 GB/s and 1 us inside a host of 8, 10 GB/s a device and 10 us between."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from shardwise.describe.cluster import Cluster, Device, Hosts, Link
from shardwise.describe.kernels import ExchangeKind
from shardwise.plan.collectives import exchange_seconds, send_seconds
from shardwise.plan.placing import Span

INSIDE = Link(name="inside", bytes_per_s=100e9, latency_s=1e-6, ranks=8, efficiency=1.0)
BETWEEN = Link(name="between", bytes_per_s=10e9, latency_s=10e-6, efficiency=1.0)
CARD = Device(name="card", memory_bytes=1 << 34, flops_per_s={"float32": 1e12}, bytes_per_s=1e12)
CLUSTER = Cluster(hosts=(Hosts(device=CARD, devices=8, count=16),), links=(INSIDE, BETWEEN))
BIG = 1e9


def seconds(kind: ExchangeKind, nbytes: float, *sizes: int, cluster: Cluster = CLUSTER) -> float:
    return exchange_seconds(kind, nbytes, Span(sizes=sizes), cluster)


def test_a_ring_in_a_host_sends_each_part_past_every_rank() -> None:
    expected = 7 / 8 * BIG / 100e9 + 7 * 1e-6
    assert seconds(ExchangeKind.ALL_GATHER, BIG, 8, 1) == pytest.approx(expected)
    assert seconds(ExchangeKind.REDUCE_SCATTER, BIG, 8, 1) == pytest.approx(expected)
    assert seconds(ExchangeKind.ALL_REDUCE, BIG, 8, 1) == pytest.approx(2 * expected, rel=0.01)


def test_a_ring_through_hosts_has_the_adapters_of_all_its_ranks_in_one() -> None:
    """8 ranks a host share 8 * 10 GB/s; one rank a host has 10 GB/s alone."""
    together, apart = (seconds(ExchangeKind.ALL_GATHER, 10 * BIG, *sizes) for sizes in ((8, 4), (1, 4)))
    assert together == pytest.approx(31 / 32 * 10 * BIG / 80e9, rel=0.01)
    assert apart == pytest.approx(3 / 4 * 10 * BIG / 10e9, rel=0.01)


def test_small_sums_over_many_hosts_go_up_a_tree() -> None:
    """A ring has as many steps as ranks, a tree as many as its depth."""
    ring = 2 * seconds(ExchangeKind.REDUCE_SCATTER, 1000, 8, 16)
    assert seconds(ExchangeKind.ALL_REDUCE, 1000, 8, 16) < 0.3 * ring


def test_every_turn_of_a_ring_through_hosts_waits_for_a_hop_between_them() -> None:
    assert seconds(ExchangeKind.ALL_GATHER, 0, 8, 4) == pytest.approx(31 * 10e-6)
    assert seconds(ExchangeKind.ALL_GATHER, 0, 1, 4) == pytest.approx(3 * 10e-6)


def test_where_a_link_has_no_trees_sums_go_round_a_ring_however_small_they_are() -> None:
    rings = dataclasses.replace(CLUSTER, links=(INSIDE, dataclasses.replace(BETWEEN, trees=False)))
    ring = 2 * seconds(ExchangeKind.REDUCE_SCATTER, 1000, 8, 16)
    assert seconds(ExchangeKind.ALL_REDUCE, 1000, 8, 16, cluster=rings) == pytest.approx(ring)
    inside = seconds(ExchangeKind.ALL_REDUCE, 1000, 8, 1)
    assert seconds(ExchangeKind.ALL_REDUCE, 1000, 8, 1, cluster=rings) == inside < ring


def test_a_switch_that_adds_saves_nearly_half() -> None:
    adds = dataclasses.replace(CLUSTER, links=(dataclasses.replace(INSIDE, reduces=True), BETWEEN))
    plain = seconds(ExchangeKind.ALL_REDUCE, BIG, 8, 1)
    assert seconds(ExchangeKind.ALL_REDUCE, BIG, 8, 1, cluster=adds) / plain == pytest.approx(9 / 14, rel=0.01)
    assert seconds(ExchangeKind.ALL_REDUCE, BIG, 4, 1, cluster=adds) == seconds(ExchangeKind.ALL_REDUCE, BIG, 4, 1)


def test_all_to_all_is_bound_by_what_leaves_the_host() -> None:
    assert seconds(ExchangeKind.ALL_TO_ALL, BIG, 8, 1) == pytest.approx(7 / 8 * BIG / 100e9, rel=0.01)
    assert seconds(ExchangeKind.ALL_TO_ALL, BIG, 8, 4) == pytest.approx(24 / 32 * BIG / 10e9, rel=0.01)


def test_a_message_takes_the_link_of_its_level() -> None:
    assert send_seconds(BIG, 0, CLUSTER) == pytest.approx(BIG / 100e9 + 1e-6)
    assert send_seconds(BIG, 1, CLUSTER) == pytest.approx(BIG / 10e9 + 10e-6)
    assert seconds(ExchangeKind.SEND, BIG, 1, 2) == pytest.approx(send_seconds(BIG, 1, CLUSTER))


@pytest.mark.parametrize("kind", list(ExchangeKind))
def test_one_rank_exchanges_nothing(kind: ExchangeKind) -> None:
    assert seconds(kind, BIG, 1, 1) == 0.0


@pytest.mark.parametrize("kind", list(ExchangeKind))
def test_more_bytes_never_take_less_time(kind: ExchangeKind) -> None:
    for sizes in ((2, 1), (8, 1), (8, 4), (1, 16)):
        found = [seconds(kind, nbytes, *sizes) for nbytes in (1e3, 1e5, 1e7, 1e9)]
        assert all(less <= more for less, more in itertools.pairwise(found))
