"""Ranks of one host over shared memory: the same promises as a process group, and what happens when a peer is gone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.comm.point_to_point import Waitable
from shardwise.comm.same_host import same_host_transport
from shardwise.errors import LaunchError, TransferError
from shardwise.launch import RankContext, init_process_group, run_ranks
from shardwise.testing import on_ranks

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip
SIZES = [0, 1, 8 << 10, (8 << 10) + 1, 1 << 20, (1 << 20) + 3, 8 << 20]


def numbered(size: int, number: int) -> torch.Tensor:
    return torch.arange(number, number + size, dtype=torch.int64).to(torch.uint8)


@on_ranks(2)
def test_sizes_from_nothing_to_many_segments_arrive_in_order(rank: RankContext) -> None:
    with same_host_transport([0, 1]) as transport:
        assert transport.connected == {1 - rank.rank}
        if rank.rank == 0:
            for number, size in enumerate(SIZES):
                transport.isend(numbered(size, number), 1).wait()
        else:
            buffers = [torch.full((size,), 77, dtype=torch.uint8) for size in SIZES]
            posted = [transport.irecv(buffer, 0) for buffer in buffers]
            for number, (work, buffer) in enumerate(zip(posted, buffers, strict=True)):
                work.wait()
                work.wait()  # a second time is nothing
                assert torch.equal(buffer, numbered(buffer.numel(), number))
        dist.barrier()


@on_ranks(2)
def test_every_dtype_and_shape_crosses_bit_by_bit(rank: RankContext) -> None:
    torch.manual_seed(1)
    with same_host_transport([0, 1]) as transport:
        for dtype in DTYPES:
            for shape in ((), (3,), (2, 0), (70, 90)):
                tensor = (torch.randn(shape) * 3).to(dtype)
                if rank.rank == 0:
                    transport.isend(tensor, 1).wait()
                else:
                    arrived = torch.empty(shape, dtype=dtype)
                    transport.irecv(arrived, 0).wait()
                    bits = [t.reshape(-1).view(torch.uint8) for t in (arrived, tensor)]
                    assert torch.equal(*bits)
        dist.barrier()


@on_ranks(2)
def test_waits_may_come_in_any_order(rank: RankContext) -> None:
    with same_host_transport([0, 1]) as transport:
        if rank.rank == 0:
            for i in range(4):
                transport.isend(torch.full((5000,), float(i)), 1).wait()
        else:
            buffers = [torch.zeros(5000) for _ in range(4)]
            posted = [transport.irecv(buffer, 0) for buffer in buffers]
            for i in (2, 0, 3, 1):
                posted[i].wait()
                assert buffers[i].eq(i).all()
        dist.barrier()


@on_ranks(2)
@pytest.mark.parametrize("elements, count", [(1 << 18, 50), (1000, 1500)])
def test_both_may_send_everything_before_they_receive_anything(rank: RankContext, elements: int, count: int) -> None:
    peer = 1 - rank.rank
    with same_host_transport([0, 1]) as transport:
        sent = [transport.isend(torch.full((elements,), float(i + rank.rank)), peer) for i in range(count)]
        buffer = torch.zeros(elements)
        for i in range(count):
            transport.irecv(buffer, peer).wait()
            assert buffer.eq(i + peer).all()
        for work in sent:
            work.wait()
        dist.barrier()


@on_ranks(3)
def test_a_rank_that_waits_for_one_peer_still_writes_to_the_other(rank: RankContext) -> None:
    # 1 -> 2 is more than a socket holds when 1 goes to wait for 0; 0 waits for 2, which waits for all of it
    count = 1500
    with same_host_transport(range(3)) as transport:
        token, buffer = torch.zeros(1), torch.zeros(1000)
        if rank.rank == 1:
            sent = [transport.isend(torch.full((1000,), float(i)), 2) for i in range(count)]
            transport.irecv(token, 0).wait()
            for work in sent:
                work.wait()
        elif rank.rank == 2:
            for i in range(count):
                transport.irecv(buffer, 1).wait()
                assert buffer[0] == i
            transport.isend(token + 1, 0).wait()
        else:
            transport.irecv(token, 2).wait()
            assert token == 1
            transport.isend(token, 1).wait()
        dist.barrier()


@on_ranks(4)
def test_everybody_exchanges_with_everybody(rank: RankContext) -> None:
    others = [other for other in range(4) if other != rank.rank]
    with same_host_transport(others) as transport:
        for turn in range(5):
            buffers = {other: torch.zeros(3000 * (turn + 1)) for other in others}
            posted: list[Waitable] = [transport.irecv(buffer, other) for other, buffer in buffers.items()]
            posted += [
                transport.isend(torch.full((3000 * (turn + 1),), 10.0 * rank.rank + turn), other) for other in others
            ]
            for work in posted:
                work.wait()
            assert all(buffer.eq(10 * other + turn).all() for other, buffer in buffers.items())
        dist.barrier()


@on_ranks(3)
def test_only_ranks_that_name_each_other_are_connected_and_others_use_the_group(rank: RankContext) -> None:
    named = {0: [1], 1: [0, 2], 2: []}[rank.rank]
    with same_host_transport(named) as transport:
        assert transport.connected == {0: {1}, 1: {0}, 2: set()}[rank.rank]
        tensor = torch.full((3,), float(rank.rank))
        if rank.rank == 1:
            transport.isend(tensor, 2).wait()
        if rank.rank == 2:
            transport.irecv(tensor, 1).wait()
            assert tensor.tolist() == [1.0, 1.0, 1.0]
        dist.barrier()


@on_ranks(2)
def test_another_size_is_an_error_with_both_numbers(rank: RankContext) -> None:
    with same_host_transport([0, 1]) as transport:
        if rank.rank == 0:
            transport.isend(torch.zeros(3), 1).wait()
        else:
            with pytest.raises(RuntimeError, match="a message of 12 bytes arrived where 16 bytes were expected"):
                transport.irecv(torch.zeros(4), 0).wait()
        dist.barrier()


@on_ranks(2)
def test_a_peer_that_stays_silent_is_an_error_after_the_timeout(rank: RankContext) -> None:
    with same_host_transport([0, 1], timeout_s=0.2) as transport:
        if rank.rank == 1:
            with pytest.raises(RuntimeError, match=r"rank 0 took longer than 0\.2 s"):
                transport.irecv(torch.zeros(4), 0).wait()
        dist.barrier()


@on_ranks(2)
def test_strided_tensors_are_refused(rank: RankContext) -> None:
    with same_host_transport([0, 1]) as transport:
        with pytest.raises(TransferError, match=r"only contiguous tensors .* strides \(1, 3\)"):
            transport.isend(torch.zeros(2, 3).t(), 1 - rank.rank)
        with pytest.raises(TransferError, match="call .contiguous"):
            transport.irecv(torch.zeros(3, dtype=torch.complex64).conj(), 1 - rank.rank)
        dist.barrier()


@on_ranks(2)
def test_nothing_is_left_after_twenty_rounds(rank: RankContext) -> None:
    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("memfd:shardwise")

    before = (0, 0)
    for turn in range(20):
        with same_host_transport([0, 1]) as transport:
            buffer = torch.zeros(100_000)
            work = transport.irecv(buffer, 1 - rank.rank)
            transport.isend(torch.ones(100_000), 1 - rank.rank).wait()
            work.wait()
            dist.barrier()
        if turn == 0:
            before = left()
    assert left() == before


def test_the_death_of_a_peer_is_an_error_at_once() -> None:
    told: list[object] = []
    with pytest.raises(LaunchError, match="SIGKILL"):
        run_ranks(
            killed_or_told, world_size=2, num_threads=1, timeout_s=60, on_message=lambda _, text: told.append(text)
        )
    assert told == ["rank 1 closed the channel: it has ended"]


def killed_or_told(context: RankContext) -> None:
    init_process_group(context, timeout_s=30)
    transport = same_host_transport([0, 1])
    work = transport.irecv(torch.zeros(3), 1 - context.rank)
    if context.rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        work.wait()
    except RuntimeError as error:
        context.post(str(error))
    time.sleep(5)
