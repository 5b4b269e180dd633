"""Where ranks that another launcher started meet, and by which backend they exchange: read off a run and a world.

    torchrun, srun, mpirun on one node     an address that their variables tell
    mpirun on several nodes                mpirun's own node, as Open MPI's variables tell; else through MPI itself
    communication.backend = "mpi"          through MPI itself, whatever the launcher: no socket is opened

Refuses to know what is trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import timedelta

from torch._C._distributed_c10d import Store

from shardwise.comm.mpi_algorithms import AUTO, open_mpi_parameters
from shardwise.comm.mpi_backend import MPI_BACKEND, start_mpi
from shardwise.comm.mpi_world import mpi_world
from shardwise.errors import ConfigError, LaunchError
from shardwise.launch import LaunchedRanks, RankContext, World, context_of_world, init_process_group
from shardwise.launch.context import store_of
from shardwise.launch.ending import ending_together
from shardwise.launch.environment import tell_open_mpi
from shardwise.train.technique_tables import CommunicationOptions

__all__ = ["Meeting", "backend_of", "check_own_ranks", "meet"]

_PREPARED_WITHIN = timedelta(minutes=30)  # the data, while the others wait for rank 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meeting:
    """This rank among its peers, and the store in which they have met; None where it is the only one."""

    context: RankContext
    store: Store | None
    by_mpi: bool

    def ranks(self, backend: str, *, timeout_s: float) -> LaunchedRanks:
        """All of them, to be called by rank 0, with a process group. Collective."""
        assert self.store is not None
        init_process_group(self.context, backend=backend, store=self.store, timeout_s=timeout_s)
        return LaunchedRanks(self.context, self.store)

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Inside, an error of one rank ends all; the first says why."""
        failed = mpi_world().fail if self.by_mpi else None
        with ending_together(self.context, self.store, on_failure=failed):
            yield


def backend_of(told: CommunicationOptions, device: str) -> str:
    """The backend of torch.distributed. Raises `ConfigError` where it does not move tensors of the device."""
    if told.backend == "auto":
        return "nccl" if device == "cuda" else "gloo"
    if (told.backend == "nccl") != (device == "cuda"):
        fitting = "nccl" if device == "cuda" else "gloo"
        raise ConfigError(
            f'gloo and mpi move tensors of the host, nccl those of GPUs, but backend = "{told.backend}" and device = '
            f'"{device}"; use backend = "{fitting}", or "auto"'
        )
    return MPI_BACKEND if told.backend == "mpi" else told.backend


def check_own_ranks(
    told: CommunicationOptions, ranks: int, device: str = "cpu", *, command: str = "train RUN.toml"
) -> None:
    """Raises `ConfigError` where shardwise starts the ranks itself and they are to exchange through MPI, and as
    `backend_of` does."""
    backend_of(told, device)
    if told.backend == "mpi" and ranks > 1:
        raise ConfigError(
            f'ranks that exchange through MPI are started by MPI, but backend = "mpi" and shardwise would start {ranks}'
            f' itself; use `mpirun -np {ranks} shardwise {command}`, or backend = "auto"'
        )


def meet(world: World, told: CommunicationOptions, device: str) -> Meeting:
    """Meet the other ranks of a launcher; each of them calls it. Raises `ConfigError`, `LaunchError`."""
    context = context_of_world(world)
    if context.world_size == 1:
        return Meeting(context=context, store=None, by_mpi=False)
    chosen = {"allreduce": told.mpi_allreduce, "allgather": told.mpi_allgather, "bcast": told.mpi_broadcast}
    if backend_of(told, device) == MPI_BACKEND:
        if world.launcher == "pmi" and set(chosen.values()) != {AUTO}:
            raise ConfigError(
                "algorithms are parameters of Open MPI, but another MPI has started the ranks; drop mpi_allreduce, "
                "mpi_allgather and mpi_broadcast, and tell it itself (MPICH: MPIR_CVAR_IALLREDUCE_INTRA_ALGORITHM)"
            )
        tell_open_mpi(open_mpi_parameters(chosen))
        return Meeting(context=context, store=_by_mpi(context, told.same_host == "shared-memory"), by_mpi=True)
    if not context.rendezvous:
        with contextlib.suppress(LaunchError):  # without mpi4py: `store_of` says what is missing
            return Meeting(context=context, store=_by_mpi(context, False), by_mpi=True)
    return Meeting(context=context, store=store_of(context, timeout=_PREPARED_WITHIN), by_mpi=False)


def _by_mpi(context: RankContext, shares_memory: bool) -> Store:
    store = start_mpi(shares_memory=shares_memory)
    there = mpi_world()
    if (there.rank, there.size) != (context.rank, context.world_size):
        raise LaunchError(
            f"MPI and the launcher number ranks alike, but to MPI this one is {there.rank} of {there.size}, and to the "
            f"launcher {context.rank} of {context.world_size}; start with the mpirun of the MPI that mpi4py finds, or "
            "with srun --mpi=pmix"
        )
    store.set_timeout(_PREPARED_WITHIN)
    return store
