"""torch.distributed over MPI alone: the backend "mpi4py", and the store in which its ranks meet.

torch's own "mpi" exists only where torch was built for one MPI; this one takes the MPI that mpi4py finds. Refuses to
know how ranks were started.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from shardwise.comm.mpi_group import MpiGroup
from shardwise.comm.mpi_store import MpiStore
from shardwise.comm.mpi_types import MpiTypes
from shardwise.comm.mpi_world import mpi_world

__all__ = ["MPI_BACKEND", "may_share_memory", "moves_host_memory", "start_mpi"]

MPI_BACKEND = "mpi4py"
_NUM_TAGS = 2**15 - 1  # that every MPI has


def start_mpi(*, shares_memory: bool = False) -> Store:
    """MPI in this process, and a store that all its processes share: `init_process_group(MPI_BACKEND, store=…)`.

    Every process of the job calls it. `shares_memory`: ranks of one host may go around MPI, through memory that they
    share. Raises `LaunchError` where there is no mpi4py or no MPI.
    """
    world = mpi_world()
    types = MpiTypes(world.mpi)

    def make(options: Any, _backend_options: object) -> MpiGroup:
        communicator = world.communicator(
            options.store,
            rank=options.group_rank,
            size=options.group_size,
            timeout_s=options.timeout.total_seconds(),
            tag=zlib.crc32(options.group_id.encode()) % _NUM_TAGS,
        )
        return MpiGroup(
            world,
            communicator,
            timeout=options.timeout,
            name=options.group_id,
            types=types,
            shares_memory=shares_memory,
        )

    dist.Backend.register_backend(MPI_BACKEND, make, extended_api=True, devices=["cpu"])
    store, uses = _store()
    return PrefixStore(f"use {next(uses)}", store)  # ranks start MPI as often as each other


@functools.cache
def _store() -> tuple[MpiStore, Iterator[int]]:
    """The one of this process, and a counter of its uses: what groups of an earlier use have left there is theirs."""
    return MpiStore(mpi_world()), itertools.count()


def moves_host_memory() -> bool:
    """Whether the default group moves tensors of the host's memory, by messages between any two ranks."""
    return dist.get_backend() in ("gloo", MPI_BACKEND)


def may_share_memory() -> bool:
    """Whether ranks of one host may exchange through memory that they share instead of the default group."""
    group = dist.distributed_c10d._get_default_group()
    return group.shares_memory if isinstance(group, MpiGroup) else dist.get_backend() == "gloo"
