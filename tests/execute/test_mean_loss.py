"""The mean loss is every micro-batch's, weighed, and the same on all ranks, whichever way it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch

from shardwise.comm.same_host import same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.execute.mean_loss import MeanLoss
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

CPU = torch.device("cpu")


def alone(factors: Sequence[float], losses: Mapping[int, torch.Tensor]) -> float:
    mean = MeanLoss(factors, device=CPU, alone=True, shards=1)
    mean.start(losses)
    return mean.wait()


def test_losses_are_weighed_in_float64() -> None:
    losses = {0: torch.tensor(1.0), 1: torch.tensor(2.0), 2: torch.tensor(2.0**-30)}
    assert alone([0.25, 0.5, 0.25], losses) == 0.25 + 1.0 + 2.0**-32


def test_a_micro_batch_without_labels_counts_for_nothing_though_its_mean_is_no_number() -> None:
    assert alone([1.0, 0.0], {0: torch.tensor(3.0), 1: torch.tensor(float("nan"))}) == 3.0
    assert alone([0.0], {0: torch.tensor(float("nan"))}) == 0.0


def test_a_loss_that_is_no_number_is_told() -> None:
    assert math.isnan(alone([1.0], {0: torch.tensor(float("nan"))}))


@on_ranks(2)
def test_every_rank_is_told_the_sum_over_all(rank: RankContext) -> None:
    mean = MeanLoss([0.75, 0.25], device=CPU, alone=False, shards=1)
    mean.start({rank.rank: torch.tensor(float(4 * rank.rank + 4))})
    assert mean.wait() == 0.75 * 4 + 0.25 * 8


@on_ranks(2)
def test_shards_that_know_the_same_losses_are_counted_once(rank: RankContext) -> None:
    mean = MeanLoss([1.0], device=CPU, alone=False, shards=2)
    mean.start({0: torch.tensor(3.0)})
    assert mean.wait() == pytest.approx(3.0)


@on_ranks(2)
def test_a_pipeline_of_one_host_is_told_by_the_ranks_that_know(rank: RankContext) -> None:
    with same_host_transport(range(2)) as transport:
        group = SameHostGroup(transport, range(2), rank.rank)
        for positions in ({0}, {1}, {0, 1}):
            mean = MeanLoss([0.75, 0.25], device=CPU, alone=False, shards=1, group=group, positions=positions)
            losses = {m: torch.tensor(m + 1.0) for m in (0, 1) if len(positions) == 1 or m == rank.rank}
            mean.start(losses if rank.rank in positions else {})
            assert mean.wait() == 0.75 + 0.5
