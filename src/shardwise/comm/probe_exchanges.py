"""Exchanges between ranks by the clock: every kind, size and group, by every way that bytes can go here.

    groups of 2 of 4 ranks    │0 1│ │2 3│     all at once, as the groups of a layout's axis exchange

*In place* is memory that the ranks of a group map, where sums of gradients lie; other tensors pass through stages. A
message is timed there and back. Collective throughout: every rank makes the same calls. Knows groups and bytes; refuses
to know what is fitted to the seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from shardwise.comm.collective import Collective, ProcessGroupCollective
from shardwise.comm.collective_over import collective_over
from shardwise.comm.point_to_point import ProcessGroupTransport, Transport
from shardwise.comm.same_host import same_host_transport
from shardwise.comm.shared_collective import SharedMemoryCollective
from shardwise.describe.kernels import ExchangeKind

__all__ = ["Exchanged", "exchange_seconds_of_all", "hidden_share"]

Run = Callable[[], object]

_MOST = 400  # calls of one exchange
_WARM_UP = 3
_SIDE = 256  # of the matrices that are multiplied beside an exchange


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exchanged:
    """One exchange, the same on every rank, and this rank's seconds of it."""

    kind: ExchangeKind
    group: int
    nbytes: int
    way: str
    chosen: bool
    seconds: float


def exchange_seconds_of_all(
    sizes: Sequence[int], *, window_s: float, device: torch.device | str = "cpu", all_ways: bool = True
) -> list[Exchanged]:
    """Of tensors of about `sizes` bytes, in groups of every number of ranks that divides all; about `window_s` each.

    `all_ways`: also those that programs do not use here. The default process group exists, of two ranks or more.
    """
    device = torch.device(device)
    found: list[Exchanged] = []
    for group in (n for n in range(2, dist.get_world_size() + 1) if dist.get_world_size() % n == 0):
        found += _collectives(group, sizes, window_s, device, all_ways=all_ways)
    found += _messages(sizes, window_s, device, all_ways=all_ways)
    return found


def hidden_share(nbytes: int, *, window_s: float, device: torch.device | str = "cpu") -> float:
    """Of an all-reduce of all ranks that runs beside products as long as it takes, the share that these hide: 0 to 1.

    Collective; the same on every rank, that of the slowest. In memory that moves fastest, as gradients are summed.
    """
    device = torch.device(device)
    with contextlib.ExitStack() as stack:
        own = collective_over([list(range(dist.get_world_size()))], stack=stack, device=device)
        assert own is not None
        flat = own.empty(nbytes // 4 // own.size * own.size, torch.float32).zero_()
        a = torch.zeros(_SIDE, _SIDE, device=device)
        own.all_reduce(flat).wait()

        def exchange() -> None:
            own.all_reduce(flat).wait()

        one_s = _most(_timed(lambda: a @ a, window_s, device), device)
        exchange_s = _most(_timed(exchange, window_s, device), device)
        products = max(1, round(exchange_s / one_s))

        def compute() -> None:
            for _ in range(products):
                a @ a

        def both() -> None:
            under_way = own.all_reduce(flat)
            compute()
            under_way.wait()

        compute_s = _most(_timed(compute, window_s, device), device)
        both_s = _most(_timed(both, window_s, device), device)
        dist.barrier()
    return min(1.0, max(0.0, (exchange_s + compute_s - both_s) / min(exchange_s, compute_s)))


def _collectives(
    group: int, sizes: Sequence[int], window_s: float, device: torch.device, *, all_ways: bool
) -> Iterator[Exchanged]:
    groups = [list(range(first, first + group)) for first in range(0, dist.get_world_size(), group)]
    with contextlib.ExitStack() as stack:
        own = collective_over(groups, stack=stack, device=device)
        assert own is not None
        shared = isinstance(own, SharedMemoryCollective)
        name = "shared memory" if shared else dist.get_backend()
        ways: list[tuple[str, Collective, bool, bool]] = [(name, own, False, True)]
        if shared:
            ways.append((f"{name}, in place", own, True, True))
            if all_ways:
                ways.append((dist.get_backend(), _of_process_group(groups, device, stack), False, False))
        for way, collective, in_place, chosen in ways:
            for _, run in _runs(collective, min(sizes), device, in_place=in_place):
                _passed(run, _WARM_UP, device)
            for size in sizes:
                for kind, run in _runs(collective, size, device, in_place=in_place):
                    seconds = _timed(run, window_s, device)
                    nbytes = size // 4 // group * group * 4
                    yield Exchanged(kind=kind, group=group, nbytes=nbytes, way=way, chosen=chosen, seconds=seconds)
        dist.barrier()


def _of_process_group(
    groups: Sequence[Sequence[int]], device: torch.device, stack: contextlib.ExitStack
) -> ProcessGroupCollective:
    own: ProcessGroupCollective | None = None
    for ranks in groups:
        made = dist.new_group(ranks, sort_ranks=False)
        if dist.get_rank() in ranks:
            assert isinstance(made, dist.ProcessGroup)
            stack.callback(dist.destroy_process_group, made)
            own = ProcessGroupCollective(made, device=device)
    assert own is not None
    return own


def _runs(
    collective: Collective, size: int, device: torch.device, *, in_place: bool
) -> Iterator[tuple[ExchangeKind, Run]]:
    numel = size // 4 // collective.size * collective.size
    flat = collective.empty(numel, torch.float32) if in_place else torch.empty(numel, device=device)
    flat.zero_()
    own = flat.view(collective.size, -1)[collective.rank]
    other = torch.empty(numel, device=device)
    yield ExchangeKind.ALL_REDUCE, lambda: collective.all_reduce(flat).wait()
    yield ExchangeKind.REDUCE_SCATTER, lambda: collective.reduce_scatter(flat, own).wait()
    yield ExchangeKind.ALL_GATHER, lambda: collective.all_gather(own, flat).wait()
    yield ExchangeKind.ALL_TO_ALL, lambda: collective.all_to_all(flat, other).wait()


def _messages(sizes: Sequence[int], window_s: float, device: torch.device, *, all_ways: bool) -> Iterator[Exchanged]:
    """Between ranks 2i and 2i + 1, all pairs at once; half of there and back. The last rank of an odd number waits."""
    rank, world = dist.get_rank(), dist.get_world_size()
    peer = rank ^ 1
    with contextlib.ExitStack() as stack:
        ways: list[tuple[str, Transport, bool]] = [(dist.get_backend(), ProcessGroupTransport(), True)]
        if device.type == "cpu" and dist.get_backend() == "gloo":
            near = stack.enter_context(same_host_transport(range(world)))
            if _all_say(len(near.connected) == world - 1):
                ways = [("shared memory", near, True), *([(*ways[0][:2], False)] if all_ways else [])]
        for way, transport, chosen in ways:
            for size in sizes:
                message = torch.zeros(size // 4, device=device)
                run = _there_and_back(transport, message, rank, peer) if peer < world else _nothing
                seconds = _timed(run, window_s, device) / 2
                yield Exchanged(
                    kind=ExchangeKind.SEND, group=2, nbytes=size // 4 * 4, way=way, chosen=chosen, seconds=seconds
                )
        dist.barrier()


def _there_and_back(transport: Transport, message: torch.Tensor, rank: int, peer: int) -> Run:
    buffer = torch.empty_like(message)

    def run() -> None:
        if rank < peer:  # NCCL does what was asked first before what was asked next
            transport.isend(message, peer).wait()
            transport.irecv(buffer, peer).wait()
        else:
            transport.irecv(buffer, peer).wait()
            transport.isend(message, peer).wait()

    return run


def _nothing() -> None:
    """An odd rank has no peer."""


def _timed(run: Run, window_s: float, device: torch.device) -> float:
    """Seconds of one, the mean over as many as fit; every rank runs as many."""
    run()
    once_s = _passed(run, 1, device)
    times = max(2, min(_MOST, int(window_s / max(_most(once_s, device), 1e-7))))
    dist.barrier()
    return _passed(run, times, device) / times


def _passed(run: Run, times: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _most(value: float, device: torch.device) -> float:
    of_ranks = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(of_ranks, op=dist.ReduceOp.MAX)
    return float(of_ranks)


def _all_say(here: bool) -> bool:
    everybody = torch.tensor(int(here))
    dist.all_reduce(everybody, op=dist.ReduceOp.MIN)
    return bool(everybody)
