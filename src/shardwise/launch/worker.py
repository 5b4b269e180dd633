"""Workers: groups of ranks that train side by side and meet now and then, each a world of its own.

    6 ranks, 2 workers      worker 0: ranks 0 1 2      worker 1: ranks 3 4 5      counterparts: 0 3, 1 4, 2 5

Inside a worker the default process group is the worker's, so that whoever runs there sees a world of its ranks alone.
Counterparts meet through a store. Refuses to know what they exchange.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from shardwise.errors import LaunchError
from shardwise.launch.context import RankContext, store_of

__all__ = ["Worker", "join_worker", "tell_all"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One worker of `count`, seen from one of its ranks.

    context  this rank inside the worker
    store    where it meets its counterparts: the ranks of the same number in the other workers
    """

    index: int
    count: int
    context: RankContext
    store: Store

    @property
    def folder(self) -> str:
        """A name for what only this worker writes."""
        return f"worker-{self.index}"


def join_worker(
    context: RankContext, *, count: int, backend: str = "gloo", timeout_s: float = 300.0, store: Store | None = None
) -> Worker:
    """Join one of `count` workers of equally many ranks, and make the default process group of its ranks, if several.

    Every rank calls it. `store` is where all ranks meet, where they have met. Raises LaunchError where a default group
    exists already, or the ranks are no multiple of `count`.
    """
    size, rest = divmod(context.world_size, count)
    if rest:
        raise LaunchError(
            f"workers have equally many ranks, but {context.world_size} ranks are no multiple of {count} workers; "
            f"start {(size + 1) * count} ranks, or change the number of workers"
        )
    if dist.is_initialized():
        raise LaunchError("a worker makes its default process group itself, but there is one; destroy that group first")
    timeout = timedelta(seconds=timeout_s)
    store = store or store_of(context, timeout=timeout)
    index, rank = divmod(context.rank, size)
    if size > 1:
        inside = PrefixStore(f"{index}/inside", store)
        dist.init_process_group(backend, store=inside, rank=rank, world_size=size, timeout=timeout)
    return Worker(
        index=index,
        count=count,
        context=replace(context, rank=rank, world_size=size),
        store=PrefixStore(f"counterparts of {rank}", store),
    )


def tell_all(context: RankContext, store: Store, make: Callable[[], T]) -> T:
    """What `make()` gives on rank 0, a value that can be pickled, on every rank, through the store alone."""
    if context.rank == 0:
        made = make()
        store.set("told", pickle.dumps(made).hex())
        return made
    told: T = pickle.loads(bytes.fromhex(bytes(store.get("told")).decode()))
    return told
