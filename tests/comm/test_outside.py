"""Ranks of other worlds add up and gather what they are given, in the order of ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from shardwise.comm.outside import OutsideCollective


def together(size: int, function: Callable[[OutsideCollective], Any]) -> list[Any]:
    store = torch.distributed.HashStore()

    def run(rank: int) -> Any:
        return function(OutsideCollective(store, "here", rank=rank, size=size, timeout_s=20))

    with ThreadPoolExecutor(size) as threads:
        return [each.result(timeout=30) for each in [threads.submit(run, rank) for rank in range(size)]]


def given(rank: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_element_is_added_in_the_order_of_ranks_wherever_it_stands(size) -> None:
    numel = 12 * size
    wanted = given(0, numel)
    for rank in range(1, size):
        wanted = wanted + given(rank, numel)

    def summed(group: OutsideCollective) -> tuple[torch.Tensor, torch.Tensor]:
        flat, turned = given(group.rank, numel), given(group.rank, numel).flip(0)
        works = [group.all_reduce(flat), group.all_reduce(turned)]
        for work in works:
            work.wait()
        assert group.sent_bytes == {"all_reduce": 2 * flat.nbytes}
        return flat, turned.flip(0)

    for flat, turned in together(size, summed):
        assert torch.equal(flat, wanted)
        assert torch.equal(turned, wanted)


def test_parts_of_sums_and_whole_tensors() -> None:
    def parts(group: OutsideCollective) -> None:
        out, flat = torch.empty(4), given(group.rank, 12)
        group.reduce_scatter(flat, out).wait()
        own = slice(4 * group.rank, 4 * group.rank + 4)
        torch.testing.assert_close(out, sum(given(rank, 12) for rank in range(3))[own])
        whole = group.empty(12, torch.float32)
        whole[own] = out
        group.all_gather(whole[own], whole).wait()
        torch.testing.assert_close(whole, sum(given(rank, 12) for rank in range(3)))

    together(3, parts)


def test_a_sum_of_any_length_and_parts_for_everyone() -> None:
    def parts(group: OutsideCollective) -> None:
        flat = given(group.rank, 7)
        group.all_reduce(flat).wait()
        torch.testing.assert_close(flat, sum(given(rank, 7) for rank in range(3)))
        got = torch.empty(6)
        group.all_to_all(torch.arange(6.0) + 10 * group.rank, got).wait()
        assert got.tolist() == [10 * rank + 2 * group.rank + i for rank in range(3) for i in range(2)]

    together(3, parts)


def test_values_of_all_ranks_are_told_in_their_order() -> None:
    told = together(3, lambda group: group.values({"rank": group.rank, "many": [group.rank] * 10**group.rank}))
    assert told[0] == told[1] == told[2]
    assert [each["rank"] for each in told[0]] == [0, 1, 2]
    assert [len(each["many"]) for each in told[0]] == [1, 10, 100]
