"""The environment says who we are, nobody, or contradicts itself: three different answers."""

from __future__ import annotations

from datetime import timedelta

import pytest

from shardwise.errors import LaunchError
from shardwise.launch import World, context_of_world, read_world
from shardwise.launch.context import store_of
from shardwise.launch.environment import asked_threads, child_environment, environment_snapshot, tell_open_mpi

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[007-009],cpu1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "n0"}


def world_of(environment: dict[str, str]) -> World:
    world = read_world(environment)
    assert world is not None
    return world


@pytest.mark.parametrize(
    "environment",
    [{}, {"MASTER_ADDR": "node0"}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}]
    + [SLURM | {"SLURM_NTASKS": "1"}],
    ids=["empty", "an address alone", "a batch script of SLURM", "a shell on a node of SLURM"],
)
def test_where_no_launcher_started_us_there_is_no_world(environment: dict[str, str]) -> None:
    assert read_world(environment) is None


def test_torchrun_says_everything() -> None:
    world = world_of(TORCHRUN)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 8, 1, 4)
    assert (world.master_addr, world.master_port, world.launcher) == ("node0", 29500, "torchrun")
    assert context_of_world(world).rendezvous == "env://"


def test_slurm_names_its_nodes_in_short() -> None:
    world = world_of(SLURM)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 6, 1, 2)
    assert world.master_addr == "gpu007"
    assert world.launcher == "slurm"


def test_tasks_of_one_slurm_step_agree_on_a_port_and_two_steps_do_not() -> None:
    port = world_of(SLURM).master_port
    assert port == world_of(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port
    assert port != world_of(SLURM | {"SLURM_STEP_ID": "1"}).master_port


def test_on_a_single_node_the_ranks_meet_on_loopback() -> None:
    one_node = {"SLURM_NODEID": "0", "SLURM_NTASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "6"}
    assert world_of(SLURM | one_node).master_addr == "127.0.0.1"
    assert context_of_world(world_of(OPENMPI)).rendezvous.startswith("tcp://127.0.0.1:")


def test_open_mpi_and_pmi_are_read() -> None:
    assert (world_of(OPENMPI).rank, world_of(OPENMPI).launcher) == (1, "openmpi")
    assert world_of(TORCHRUN).has_users_terminal
    assert not world_of(OPENMPI).has_users_terminal
    assert (world_of(PMI).rank, world_of(PMI).master_addr, world_of(PMI).launcher) == (3, "n0", "pmi")


def test_open_mpi_on_several_nodes_meets_where_mpirun_runs() -> None:
    several = OPENMPI | {
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_MCA_orte_hnp_uri": "208.0;tcp://192.0.2.2,172.17.0.1:40787;tcp6://[fd00::2]:47293",
        "OMPI_MCA_orte_local_daemon_uri": "208.1;tcp://192.0.2.3:40001",
    }
    assert world_of(several).master_addr == "192.0.2.2"
    assert world_of(several | {"MASTER_ADDR": "n7"}).master_addr == "n7"
    of_rank_0 = several | {"OMPI_COMM_WORLD_RANK": "0"}
    elsewhere = world_of(of_rank_0)
    assert elsewhere.master_addr == ""  # rank 0 is not on mpirun's node: MPI itself has to tell
    assert context_of_world(elsewhere).rendezvous == ""
    with pytest.raises(LaunchError, match="install mpi4py .* or export MASTER_ADDR"):
        store_of(context_of_world(elsewhere), timeout=timedelta(seconds=1))
    here = of_rank_0 | {"OMPI_MCA_orte_local_daemon_uri": several["OMPI_MCA_orte_hnp_uri"]}
    assert world_of(here).master_addr == "192.0.2.2"


def test_mpich_on_several_nodes_tells_no_address() -> None:
    several = {k: v for k, v in PMI.items() if k != "MASTER_ADDR"}
    assert world_of(several).master_addr == ""


def test_mpirun_inside_a_step_of_slurm_is_mpirun() -> None:
    assert world_of(SLURM | OPENMPI).launcher == "openmpi"
    assert world_of(SLURM | PMI).launcher == "pmi"


def test_srun_with_pmi2_is_slurm() -> None:
    assert world_of(SLURM | {"PMI_RANK": "5", "PMI_SIZE": "6"}).launcher == "slurm"


@pytest.mark.parametrize("missing", OPENMPI)
def test_half_of_open_mpis_variables_are_refused_by_name(missing: str) -> None:
    half = {name: value for name, value in OPENMPI.items() if name != missing}
    with pytest.raises(LaunchError, match=rf"but {missing} is missing.*start with openmpi, or unset"):
        read_world(half)


def test_open_mpi_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "3")
    tell_open_mpi({"coll_libnbc_iallreduce_algorithm": "1"})
    assert environment_snapshot()["OMPI_MCA_coll_libnbc_iallreduce_algorithm"] == "1"


def test_an_address_of_ipv6_is_bracketed() -> None:
    assert context_of_world(world_of(PMI | {"MASTER_ADDR": "fe80::1"})).rendezvous.startswith("tcp://[fe80::1]:")


@pytest.mark.parametrize("missing", TORCHRUN)
def test_half_of_torchruns_variables_are_refused_by_name(missing: str) -> None:
    half = {name: value for name, value in TORCHRUN.items() if name != missing}
    if missing == "RANK":
        half["LOCAL_RANK"] = "1"
    with pytest.raises(LaunchError, match=rf"but {missing} is missing.*start with torchrun, or unset"):
        read_world(half)


@pytest.mark.parametrize(
    "wrong, rule",
    [
        (TORCHRUN | {"RANK": "8"}, "rank 8 is not one of 8"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is not an integer"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4 does not fit a world of 8"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        (PMI | {"PMI_SIZE": ""}, "PMI_SIZE='' is not an integer"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2x3"}, "is not like"),
        (SLURM | {"SLURM_NODEID": "3"}, "node 3 of 3"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(wrong: dict[str, str], rule: str) -> None:
    with pytest.raises(LaunchError, match=rule):
        read_world(wrong)


def test_processes_of_ours_stay_on_loopback_and_forget_our_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    given = child_environment("/ours")
    assert given["GLOO_SOCKET_IFNAME"] == "lo"
    assert given["PYTHONPATH"] == "/ours:/theirs"
    assert "RANK" not in given
    assert "OMPI_COMM_WORLD_RANK" not in given
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert child_environment("/ours")["GLOO_SOCKET_IFNAME"] == "eth0"


def test_threads_are_those_that_openmp_is_asked_for() -> None:
    assert asked_threads({}) is None
    assert asked_threads({"OMP_NUM_THREADS": "3"}) == 3
    assert asked_threads({"OMP_NUM_THREADS": "2,1"}) == 2  # of nested regions
    with pytest.raises(LaunchError, match="OMP_NUM_THREADS='many' is not a number of threads; use 1 or more"):
        asked_threads({"OMP_NUM_THREADS": "many"})
