"""What a rank does in this benchmark, started by mpirun: the same exchange by every backend in turn, by the clock.

Rank 0 writes what the slowest rank needed in every round. Knows neither tables nor machines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from shardwise.comm.collective import Collective, ProcessGroupCollective
from shardwise.comm.collective_over import shared_memory_over
from shardwise.comm.mpi_algorithms import open_mpi_parameters
from shardwise.comm.mpi_backend import MPI_BACKEND, start_mpi
from shardwise.comm.mpi_world import mpi_world
from shardwise.comm.point_to_point import Transport
from shardwise.comm.ring import GroupTransport
from shardwise.comm.same_host import same_host_transport
from shardwise.launch.environment import tell_open_mpi

__all__ = ["GLOO", "MPI", "OPERATIONS", "SHARED"]

GLOO, MPI, SHARED = "gloo", "MPI", "shared memory"
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "one way")
WARM_UP = 2
TIMEOUT = timedelta(seconds=120)

Seconds = dict[str, list[float]]  # backend -> of every round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allreduce", default="auto")
    parser.add_argument("--allgather", default="auto")
    parser.add_argument("--sizes", required=True, help="bytes:rounds, …")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tell_open_mpi(open_mpi_parameters({"allreduce": options.allreduce, "allgather": options.allgather}))
    store, world = start_mpi(), mpi_world()
    dist.init_process_group(MPI_BACKEND, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    sizes = {int(size): int(rounds) for size, rounds in (each.split(":") for each in options.sizes.split(","))}
    chosen = {"all-reduce": options.allreduce, "all-gather": options.allgather}
    found = measured(sizes, [what for what, name in chosen.items() if name != "auto"])
    if world.rank == 0:
        options.output.write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(sizes: Mapping[int, int], chosen: Sequence[str]) -> list[dict[str, object]]:
    """One entry an operation and size: seconds of every round, of the slowest rank, by backend.

    All operations by all backends where Open MPI was told nothing; else those of `chosen`, beside gloo.
    """
    found: list[dict[str, object]] = []
    ranks, own = list(range(dist.get_world_size())), dist.get_rank()
    with contextlib.ExitStack() as stack:
        gloo, mpi = dist.new_group(ranks, backend="gloo"), dist.group.WORLD
        assert isinstance(gloo, dist.ProcessGroup)
        assert mpi is not None
        shared = shared_memory_over(ranks, mpi, stack)
        assert shared is not None, "the ranks do not map each other's memory"
        same_host = stack.enter_context(same_host_transport(ranks, timeout_s=TIMEOUT.total_seconds()))
        collectives: dict[str, Collective] = {
            GLOO: ProcessGroupCollective(gloo),
            MPI: ProcessGroupCollective(mpi),
            SHARED: shared,
        }
        transports: dict[str, Transport] = {GLOO: GroupTransport(gloo), MPI: GroupTransport(mpi), SHARED: same_host}
        if chosen:
            del collectives[SHARED]
        for num_bytes, rounds in sizes.items():
            for what in chosen or OPERATIONS[:3]:
                ways = {name: _collective(what, each, num_bytes, own) for name, each in collectives.items()}
                found.append(_row(what, num_bytes, _timed(ways, rounds, everybody=True)))
            if chosen:
                continue
            ways = {name: _ping_pong(each, num_bytes, own) for name, each in transports.items()}
            found.append(_row("one way", num_bytes, _timed(ways, rounds, everybody=False)))
    return found


def _row(what: str, num_bytes: int, seconds: Seconds) -> dict[str, object]:
    return {"what": what, "ranks": dist.get_world_size(), "bytes": num_bytes, "seconds": seconds}


def _collective(what: str, group: Collective, num_bytes: int, own: int) -> Callable[[], float]:
    """One call on float32 in the memory that the backend moves fastest, whose result is looked at; its seconds."""
    numel = max(1, num_bytes // 4 // group.size) * group.size
    flat = group.empty(numel, torch.float32)
    part = flat[own * numel // group.size : (own + 1) * numel // group.size]
    calls = {
        "all-reduce": lambda: group.all_reduce(flat),
        "all-gather": lambda: group.all_gather(part, flat),
        "reduce-scatter": lambda: group.reduce_scatter(flat, part),
    }
    total = float(sum(range(group.size)))

    def once() -> float:
        flat.fill_(float(own))
        dist.barrier()
        start = time.perf_counter()
        calls[what]().wait()
        seconds = time.perf_counter() - start
        expected = torch.arange(group.size).repeat_interleave(numel // group.size) if what == "all-gather" else total
        looked_at = part if what == "reduce-scatter" else flat
        assert bool(looked_at.eq(expected).all()), f"{what} is wrong"
        return seconds

    return once


def _ping_pong(transport: Transport, num_bytes: int, own: int) -> Callable[[], float]:
    """Half of there and back between ranks 0 and 1."""
    message, buffer = torch.full((num_bytes,), 1, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)

    def once() -> float:
        dist.barrier()
        start = time.perf_counter()
        if own == 0:
            transport.isend(message, 1).wait()
            transport.irecv(buffer, 1).wait()
        if own == 1:
            transport.irecv(buffer, 0).wait()
            transport.isend(message, 0).wait()
        seconds = (time.perf_counter() - start) / 2
        assert own > 1 or bool(buffer.eq(1).all()), "what arrived is not what was sent"
        return seconds

    return once


def _timed(ways: Mapping[str, Callable[[], float]], rounds: int, *, everybody: bool) -> Seconds:
    """All ways in every round, in an order that rotates; of the slowest rank, or of rank 0."""
    own: Seconds = {name: [] for name in ways}
    for turn in range(WARM_UP + rounds):
        for name in _rotated(tuple(ways), turn):
            seconds = ways[name]()
            if turn >= WARM_UP:
                own[name].append(seconds)
    table = torch.tensor(list(own.values()), dtype=torch.float64)
    if everybody:
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return dict(zip(own, table.tolist(), strict=True))


def _rotated(names: Sequence[str], turn: int) -> Sequence[str]:
    first = turn % len(names)
    return (*names[first:], *names[:first])


if __name__ == "__main__":
    main()
