"""Who a rank is and how it joins its peers: a value, and the one place where a default process group is made.

It does not know how the rank was started.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from shardwise.errors import LaunchError
from shardwise.launch.environment import World

__all__ = ["RankContext", "context_of_world", "init_process_group", "store_of"]

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def _nobody_listens(_value: object) -> None:
    """Where nobody started us, nobody hears what we post."""


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """One rank among its peers.

    rank, world_size  0 ≤ rank < world_size
    local_rank        its number on this node: the index of its GPU
    rendezvous        where the ranks meet: file://…, tcp://host:port or env://; "" where they have a store
    post              sends any value to the process that started the ranks, at once and without waiting
    """

    rank: int
    world_size: int
    local_rank: int
    rendezvous: str
    post: Callable[[object], None] = field(default=_nobody_listens, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(f"rank {self.rank} is not one of {self.world_size}; use 0 to {self.world_size - 1}")


def context_of_world(world: World) -> RankContext:
    """The context of a process that torchrun, SLURM or MPI started; without a place to meet where none is known."""
    address = f"[{world.master_addr}]" if ":" in world.master_addr else world.master_addr
    return RankContext(
        rank=world.rank,
        world_size=world.world_size,
        local_rank=world.local_rank,
        rendezvous="env://" if world.launcher == "torchrun" else f"tcp://{address}:{world.master_port}" * bool(address),
    )


def init_process_group(
    context: RankContext, *, timeout_s: float = 300.0, backend: str = "gloo", store: Store | None = None
) -> None:
    """Makes sure that the default process group exists; every rank calls it. `store` is where they have met, if they
    have.

    A group that exists already (in a warm pool) is kept. `timeout_s` bounds each later operation: a rank that
    waits for a peer which is stuck sees an error after that time, not torch's half hour.
    LaunchError where the existing group is another world's.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (context.rank, context.world_size):
            raise LaunchError(
                f"rank {context.rank} of {context.world_size} already belongs to a group of "
                f"{dist.get_world_size()} as rank {dist.get_rank()}; destroy that group first"
            )
        return
    timeout = timedelta(seconds=timeout_s)
    meeting = urlsplit(context.rendezvous)
    if store is None and meeting.scheme == "tcp" and meeting.hostname in _LOOPBACK and meeting.port is not None:
        store = _loopback_store(context, port=meeting.port, timeout=timeout)
    if store is not None:
        dist.init_process_group(backend, store=store, rank=context.rank, world_size=context.world_size, timeout=timeout)
    else:
        dist.init_process_group(
            backend,
            init_method=context.rendezvous,
            rank=context.rank,
            world_size=context.world_size,
            timeout=timeout,
        )


def store_of(context: RankContext, *, timeout: timedelta) -> Store:
    """Where the ranks of `context` meet, without a process group; every rank calls it, and keeps what it gets."""
    if not context.rendezvous:
        raise LaunchError(
            f"ranks on several nodes meet at an address, but nothing tells rank {context.rank} that of rank 0; install "
            "mpi4py (MPI tells it), or export MASTER_ADDR to all of them (mpirun -x MASTER_ADDR=…)"
        )
    meeting = urlsplit(context.rendezvous)
    if meeting.scheme == "tcp" and meeting.hostname in _LOOPBACK and meeting.port is not None:
        return _loopback_store(context, port=meeting.port, timeout=timeout)
    met = rendezvous(context.rendezvous, context.rank, context.world_size, timeout=timeout)
    store, _, _ = next(met)
    assert isinstance(store, Store)
    store.set_timeout(timeout)
    return store


def _loopback_store(context: RankContext, *, port: int, timeout: timedelta) -> Store:
    """A TCPStore that listens on 127.0.0.1 alone; torch's own listens on every interface."""
    if context.rank > 0:
        return TCPStore("127.0.0.1", port, context.world_size, is_master=False, timeout=timeout)
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise LaunchError(
            f"rank 0 listens for the others on port {port} of this machine, but: {error.strerror}; another job of "
            "shardwise may use it: export another MASTER_PORT to all ranks"
        ) from error
    return TCPStore(
        "127.0.0.1",
        port,
        context.world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
