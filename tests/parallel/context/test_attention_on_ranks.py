"""Both attentions on processes, through shared memory and through a process group."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from parallel.context.attention_cases import Case, Divided, assert_close, joined, on_one_rank
from shardwise.comm.same_host import same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.launch import RankContext
from shardwise.parallel.context.links import Links
from shardwise.parallel.context.ring import ring_attention
from shardwise.parallel.context.ulysses import ulysses_attention
from shardwise.parallel.tensor.processes import ProcessTensorGroup
from shardwise.testing import on_ranks

CASES = [
    Case(size=16, is_causal=True),
    Case(is_causal=True, kv_heads=2, zigzag=False),
    Case(mask="padded from the left"),
    Case(mask="bias", keys=7),
    Case(size=5, is_causal=True),
    Case(size=600, dim=32, value_dim=32, is_causal=True, samples=1),  # messages of several hundred KiB
]
KINDS = {"ring": ring_attention, "ulysses": ulysses_attention}
TRANSPORTS = ["shared memory", "process group"]


@contextlib.contextmanager
def links(rank: RankContext, transport: str) -> Iterator[Links]:
    if transport == "process group":
        process_group = dist.new_group(range(rank.world_size))
        assert isinstance(process_group, dist.ProcessGroup)
        yield ProcessTensorGroup(process_group)
        dist.destroy_process_group(process_group)
    else:
        with same_host_transport(range(rank.world_size)) as shared:
            yield SameHostGroup(shared, range(rank.world_size), rank.rank)
            dist.barrier()


def check(rank: RankContext, attention: Divided, transport: str) -> None:
    with links(rank, transport) as group:
        for case in CASES:
            learns = case.mask == "bias"
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
                typed = dataclasses.replace(case, dtype=dtype)
                own = on_one_rank(typed, attention, group, learns_mask=learns)
                parts: list[list[torch.Tensor]] = [[] for _ in range(rank.world_size)]
                dist.all_gather_object(parts, own)
                assert_close(joined(typed, parts), typed.expected(learns_mask=learns), tolerance=tolerance)


@on_ranks(2)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_what_one_device_gives(rank: RankContext, kind: str, transport: str) -> None:
    check(rank, KINDS[kind], transport)


@on_ranks(3)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_three_ranks_give_what_one_device_gives(rank: RankContext, kind: str, transport: str) -> None:
    check(rank, KINDS[kind], transport)


@on_ranks(4)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_give_what_one_device_gives(rank: RankContext, kind: str, transport: str) -> None:
    check(rank, KINDS[kind], transport)


@on_ranks(4)
def test_keys_travel_no_further_than_they_are_seen(rank: RankContext) -> None:
    case = Case(size=16, is_causal=True, zigzag=False)
    with same_host_transport(range(4)) as shared:
        group = SameHostGroup(shared, range(4), rank.rank)
        on_one_rank(case, ring_attention, group)
        # keys of 0 go to 1, 2 and 3, of 1 to 2 and 3, of 2 to 3; twice, and their gradients as far, and home
        message = case.samples * case.kv_heads * 4 * 2 * case.dim * 8
        assert group.sent_bytes == message * [2, 2 * 2 + 1, 3 * 2 + 2, 3][rank.rank]
        dist.barrier()
