"""Ranks join workers: worlds of their own, which know the ranks of the same number in the others."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.errors import LaunchError
from shardwise.launch import RankContext, run_ranks
from shardwise.launch.context import store_of
from shardwise.launch.worker import join_worker, tell_all

TIMEOUT = datetime.timedelta(seconds=20)


def joined(context: RankContext) -> tuple[int, int, int, list[int]]:
    worker = join_worker(context, count=2)
    own = torch.tensor([context.rank])
    ranks = [torch.empty(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(ranks, own)  # of the worker
    worker.store.set(str(worker.index), str(context.rank))
    other = int(worker.store.get(str(1 - worker.index)))
    dist.destroy_process_group()
    return worker.index, worker.context.rank, other, [int(rank) for rank in ranks]


def test_four_ranks_are_two_workers_and_each_rank_has_a_counterpart() -> None:
    assert run_ranks(joined, world_size=4, num_threads=1) == [
        (0, 0, 2, [0, 1]),
        (0, 1, 3, [0, 1]),
        (1, 0, 0, [2, 3]),
        (1, 1, 1, [2, 3]),
    ]


def test_a_rank_that_is_a_worker_needs_no_process_group(tmp_path: Path) -> None:
    context = RankContext(rank=0, world_size=1, local_rank=0, rendezvous=(tmp_path / "meeting").as_uri())
    worker = join_worker(context, count=1)
    assert (worker.index, worker.context) == (0, context)
    assert not dist.is_initialized()


def test_workers_have_equally_many_ranks(tmp_path: Path) -> None:
    context = RankContext(rank=0, world_size=3, local_rank=0, rendezvous=(tmp_path / "meeting").as_uri())
    with pytest.raises(LaunchError, match="3 ranks are no multiple of 2 workers; start 4 ranks"):
        join_worker(context, count=2)


def told(context: RankContext) -> object:
    meeting = dataclasses.replace(context, rendezvous=context.rendezvous + "-told")
    store = store_of(meeting, timeout=TIMEOUT)
    return tell_all(meeting, store, lambda: {"from": context.rank, "value": (1, None)})


def test_what_the_first_rank_makes_every_rank_is_told() -> None:
    assert run_ranks(told, world_size=2, num_threads=1) == [{"from": 0, "value": (1, None)}] * 2
