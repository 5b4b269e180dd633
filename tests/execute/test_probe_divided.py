"""Every way to divide a small model is timed on the same ranks, in turns, with what one of them does meanwhile."""

from __future__ import annotations

import pytest

from shardwise.describe.kernels import ExchangeKind, KernelKind
from shardwise.execute.probe_divided import DividedWay, divided_seconds, layouts_that_divide, ways_to_divide
from shardwise.testing import on_ranks


def products(way: DividedWay) -> int:
    return sum(kernel.flops * kernel.count for kernel in way.kernels if kernel.kind is KernelKind.MATMUL)


def functions(way: DividedWay) -> int:
    return sum(kernel.count for kernel in way.kernels if kernel.kind is KernelKind.FUNCTION)


@pytest.mark.slow
def test_ways_divide_the_work_of_the_first_and_exchange_what_it_does_not() -> None:
    undivided, *ways = ways_to_divide(2)
    assert undivided.group == 1
    assert not undivided.exchanges
    assert [str(way.layout).split(",", 2)[2] for way in ways] == [
        "tp=2,micro_batches=2",
        "tp=2,sequence_parallel=on,micro_batches=2",
        "cp=2,micro_batches=2",
        "cp=2,context=ulysses,micro_batches=2",
    ]
    for way in ways:
        assert products(way) == pytest.approx(products(undivided) / 2, rel=0.05)
        assert way.exchanges
        assert bool(functions(way)) is (way.layout.cp > 1 or bool(way.layout.sequence_parallel))
    assert {exchange.kind for exchange in ways[2].exchanges} >= {ExchangeKind.SEND}
    assert {exchange.kind for exchange in ways[3].exchanges} >= {ExchangeKind.ALL_TO_ALL}


@pytest.mark.parametrize("ranks, groups", [(3, {1, 3}), (5, {1}), (4, {1, 2, 4}), (6, {1, 2}), (8, {1, 2, 4})])
def test_units_are_divided_among_two_and_up_to_four_where_ranks_go_round(ranks: int, groups: set[int]) -> None:
    layouts = layouts_that_divide(ranks)
    assert {layout.tp * layout.cp for layout in layouts} == groups
    assert all(layout.world_size == ranks for layout in layouts)


@on_ranks(2)
def test_every_visit_of_every_way_has_its_seconds(rank) -> None:
    way = DividedWay(layout=layouts_that_divide(2)[0], group=1, kernels=(), exchanges=())
    found = divided_seconds((way, way), visits=2, visit_s=0.0)
    assert [len(own) for own in found] == [2, 2]
    assert all(0 < seconds < 60 for own in found for seconds in own)
