"""Which backend a run exchanges by, and what is refused before ranks meet."""

from __future__ import annotations

import pytest

from shardwise.comm.mpi_backend import MPI_BACKEND
from shardwise.errors import ConfigError
from shardwise.launch import World
from shardwise.train.meeting import backend_of, check_own_ranks, meet
from shardwise.train.technique_tables import CommunicationOptions


def told(**options: str) -> CommunicationOptions:
    return CommunicationOptions.model_validate(options)


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("auto", "cpu", "gloo"),
        ("auto", "cuda", "nccl"),
        ("gloo", "cpu", "gloo"),
        ("nccl", "cuda", "nccl"),
        ("mpi", "cpu", MPI_BACKEND),
    ],
)
def test_a_backend_is_one_of_torch(backend: str, device: str, expected: str) -> None:
    assert backend_of(told(backend=backend), device) == expected


@pytest.mark.parametrize(("backend", "device"), [("nccl", "cpu"), ("gloo", "cuda"), ("mpi", "cuda")])
def test_a_backend_that_does_not_move_tensors_of_the_device_is_refused(backend: str, device: str) -> None:
    with pytest.raises(ConfigError, match=rf'backend = "{backend}" and device = "{device}"; use backend ='):
        backend_of(told(backend=backend), device)


def test_shardwise_does_not_start_ranks_that_exchange_through_mpi() -> None:
    with pytest.raises(ConfigError, match="mpirun -np 4 shardwise train"):
        check_own_ranks(told(backend="mpi"), 4)
    check_own_ranks(told(backend="mpi"), 1)
    check_own_ranks(told(), 4)


def world(launcher: str, world_size: int = 2) -> World:
    return World(
        rank=0,
        world_size=world_size,
        local_rank=0,
        local_world_size=world_size,
        master_addr="127.0.0.1",
        master_port=29500,
        launcher=launcher,  # type: ignore[arg-type]
    )


def test_a_rank_by_itself_meets_nobody() -> None:
    meeting = meet(world("openmpi", 1), told(backend="mpi"), "cpu")
    assert meeting.store is None
    assert not meeting.by_mpi


def test_algorithms_of_open_mpi_are_not_told_to_another_mpi() -> None:
    with pytest.raises(ConfigError, match="MPIR_CVAR_IALLREDUCE_INTRA_ALGORITHM"):
        meet(world("pmi"), told(backend="mpi", mpi_allreduce="ring"), "cpu")


def test_algorithms_are_checked_where_they_are_written() -> None:
    with pytest.raises(ConfigError, match='Open MPI has ring, binomial.* but got "rings"'):
        told(backend="mpi", mpi_allreduce="rings")
    with pytest.raises(ValueError, match='are for backend = "mpi"'):
        told(mpi_allreduce="ring")
