"""What a rank does in this benchmark: the same exchange over two transports in turn, by the clock.

Everything returned is plain numbers. Knows neither ratios nor files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from shardwise.comm.collective import ProcessGroupCollective
from shardwise.comm.collective_over import collective_over
from shardwise.comm.point_to_point import ProcessGroupTransport, Transport
from shardwise.comm.same_host import same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.comm.shared_collective import SharedMemoryCollective
from shardwise.launch import RankContext

__all__ = ["GLOO", "OURS", "timed_sums", "timed_transfers"]

OURS = "shardwise"
GLOO = "gloo"
WARM_UP = 3

Seconds = dict[str, list[float]]  # contender -> of every round
Way = Callable[[torch.Tensor], object]


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
    """Sums and gathers of float32 over all ranks: seconds of every round.

    *All-reduce* is by messages through shared memory. The others are of ranks that map each other's memory: a tensor
    that lies in it (*in place*), or any tensor.
    """
    torch.set_num_threads(1)
    everybody = range(context.world_size)
    measured: dict[str, Seconds] = {}
    with contextlib.ExitStack() as stack:
        transport = stack.enter_context(same_host_transport(everybody))
        group = SameHostGroup(transport, everybody, context.rank)
        shared = collective_over([everybody], stack=stack)
        assert isinstance(shared, SharedMemoryCollective), "the ranks do not map each other's memory"
        world = dist.group.WORLD
        assert world is not None
        gloo = ProcessGroupCollective(world)
        numel = num_bytes // 4 // len(everybody) * len(everybody)
        placed, anywhere = shared.empty(numel, torch.float32), torch.empty(numel)
        part = slice(context.rank * numel // len(everybody), (context.rank + 1) * numel // len(everybody))
        ways: dict[str, tuple[torch.Tensor, Way, Way]] = {
            "all-reduce": (anywhere, group.all_reduce, dist.all_reduce),
            "all-reduce in place": (placed, lambda t: shared.all_reduce(t).wait(), dist.all_reduce),
            "all-reduce of any memory": (anywhere, lambda t: shared.all_reduce(t).wait(), dist.all_reduce),
            "reduce-scatter": (
                placed,
                lambda t: shared.reduce_scatter(t, t[part]).wait(),
                lambda t: gloo.reduce_scatter(t, t[part]).wait(),
            ),
            "all-gather": (
                placed,
                lambda t: shared.all_gather(t[part], t).wait(),
                lambda t: gloo.all_gather(t[part], t).wait(),
            ),
        }
        for what, (tensor, ours, theirs) in ways.items():
            seconds = measured[what] = {OURS: [], GLOO: []}
            ways_of = {OURS: ours, GLOO: theirs}
            for turn in range(WARM_UP + rounds):
                for name in _rotated(tuple(ways_of), turn):
                    tensor.fill_(float(context.rank))
                    dist.barrier()
                    start = time.perf_counter()
                    ways_of[name](tensor)
                    if turn >= WARM_UP:
                        seconds[name].append(time.perf_counter() - start)
                    assert _is_right(what, tensor, part, context), f"{name} computes {what} wrongly"
                    dist.barrier()
    return measured


def _is_right(what: str, tensor: torch.Tensor, part: slice, context: RankContext) -> bool:
    everybody = range(context.world_size)
    if what == "all-gather":
        parts = tensor.view(context.world_size, -1)
        return all(bool(parts[i].eq(float(i)).all()) for i in everybody)
    return bool((tensor[part] if what == "reduce-scatter" else tensor).eq(sum(everybody)).all())


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
