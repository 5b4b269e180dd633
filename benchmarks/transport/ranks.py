"""What a rank does in this benchmark: the same exchange over two transports in turn, by the clock.

Everything returned is plain numbers. Knows neither ratios nor files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from shardwise.comm.point_to_point import ProcessGroupTransport, Transport
from shardwise.comm.same_host import same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.launch import RankContext

__all__ = ["GLOO", "OURS", "timed_sums", "timed_transfers"]

OURS = "shardwise"
GLOO = "gloo"
WARM_UP = 3

Seconds = dict[str, list[float]]  # contender -> of every round


def timed_transfers(context: RankContext, num_bytes: int, rounds: int) -> Mapping[str, Seconds]:
    """One way of a ping-pong between two ranks, and the posting of a send: seconds of every round."""
    torch.set_num_threads(1)
    message, buffer = torch.full((num_bytes,), 1, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    one_way: Seconds = {OURS: [], GLOO: []}
    posting: Seconds = {OURS: [], GLOO: []}
    with same_host_transport([0, 1]) as ours:
        assert ours.connected, "the ranks do not reach each other through shared memory"
        contenders: Mapping[str, Transport] = {OURS: ours, GLOO: ProcessGroupTransport()}
        for turn in range(WARM_UP + rounds):
            for name in _rotated(tuple(contenders), turn):
                dist.barrier()
                there_and_back, post = _ping_pong(contenders[name], context.rank, message, buffer)
                if turn >= WARM_UP:
                    one_way[name].append(there_and_back / 2)
                    posting[name].append(post)
        dist.barrier()
    assert torch.equal(buffer, message), "what arrived is not what was sent"
    return {"one way": one_way, "posting a send": posting}


def timed_sums(context: RankContext, num_bytes: int, rounds: int) -> Mapping[str, Seconds]:
    """An all-reduce of float32 over all ranks: seconds of every round."""
    torch.set_num_threads(1)
    everybody = range(context.world_size)
    seconds: Seconds = {OURS: [], GLOO: []}
    with same_host_transport(everybody) as transport:
        group = SameHostGroup(transport, everybody, context.rank)
        contenders: Mapping[str, Callable[[torch.Tensor], object]] = {OURS: group.all_reduce, GLOO: dist.all_reduce}
        for turn in range(WARM_UP + rounds):
            for name in _rotated(tuple(contenders), turn):
                tensor = torch.full((num_bytes // 4,), float(context.rank))
                dist.barrier()
                start = time.perf_counter()
                contenders[name](tensor)
                if turn >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
                assert tensor.eq(sum(everybody)).all(), f"{name} sums wrongly"
        dist.barrier()
    return {"all-reduce": seconds}


def _ping_pong(transport: Transport, rank: int, message: torch.Tensor, buffer: torch.Tensor) -> tuple[float, float]:
    """Seconds there and back, seen from rank 0, and of posting this rank's send."""
    start = time.perf_counter()
    peer = 1 - rank
    received = transport.irecv(buffer, peer)
    if rank == 1:
        received.wait()
    before = time.perf_counter()
    sent = transport.isend(message, peer)
    posted = time.perf_counter()
    if rank == 0:
        received.wait()
    sent.wait()
    return time.perf_counter() - start, posted - before


def _rotated(names: Sequence[str], turn: int) -> Sequence[str]:
    first = turn % len(names)
    return (*names[first:], *names[:first])
