"""Rank 0 calls functions on ranks that exist already, as it would on a pool of its own."""

from __future__ import annotations

import torch
import torch.distributed as dist

from shardwise.launch import LaunchedRanks, RankContext
from shardwise.testing import on_ranks


def ranks_of(rank: RankContext, name: str) -> LaunchedRanks:
    store = dist.distributed_c10d._get_default_store()
    return LaunchedRanks(rank, dist.PrefixStore(name, store))


def summed(context: RankContext, start: int) -> tuple[int, float]:
    total = torch.tensor(float(start + context.rank))
    dist.all_reduce(total)
    return context.rank, total.item()


@on_ranks(2)
def test_a_call_runs_on_all_ranks_at_once_and_its_results_come_in_their_order(rank: RankContext) -> None:
    ranks = ranks_of(rank, "calls")
    assert ranks.world_size == 2
    if rank.rank > 0:
        ranks.serve()
        return
    assert ranks.run(summed, 10) == [(0, 21.0), (1, 21.0)]
    offset = 5  # a function of this place travels, with what it has seen
    assert ranks.run(lambda context: context.rank + offset) == [5, 6]
    ranks.close()


@on_ranks(2)
def test_ranks_that_are_not_needed_stop_serving(rank: RankContext) -> None:
    ranks = ranks_of(rank, "nothing")
    if rank.rank == 0:
        ranks.close()
    else:
        ranks.serve()
