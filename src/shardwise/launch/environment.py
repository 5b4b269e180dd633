"""What the process was told by whoever started it: the only file that reads or copies the environment.

It knows the variables of torchrun, SLURM, Open MPI and PMI (MPICH, Intel MPI), and what the processes that
shardwise itself starts are given. It knows nothing of layouts and opens no connection.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from shardwise.errors import LaunchError

__all__ = [
    "Launcher",
    "World",
    "asked_threads",
    "child_environment",
    "environment_snapshot",
    "read_world",
    "tell_open_mpi",
]

Launcher = Literal["torchrun", "slurm", "openmpi", "pmi"]

_LOOPBACK = "127.0.0.1"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# launcher -> the variables of rank, world size, local rank and local world size
_MPI: Mapping[Launcher, tuple[str, str, str, str]] = MappingProxyType(
    {
        "openmpi": (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
        "pmi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    }
)


@dataclass(frozen=True, kw_only=True)
class World:
    """One process's place among all that a launcher started.

    rank, world_size              0 ≤ rank < world_size, over all nodes
    local_rank, local_world_size  the same on this node
    master_addr, master_port      where rank 0 listens for the others; the address is "" where no variable tells it
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: Launcher

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(
                f"{self.launcher}: rank {self.rank} is not one of {self.world_size}; "
                "start every process with the same launcher command"
            )
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise LaunchError(
                f"{self.launcher}: local rank {self.local_rank} of {self.local_world_size} does not fit a "
                f"world of {self.world_size}; start every process with the same launcher command"
            )
        if not 0 < self.master_port < 2**16:
            raise LaunchError(f"MASTER_PORT={self.master_port} is not a port; use 1024 to 65535")

    @property
    def has_users_terminal(self) -> bool:
        """Whether standard output, where it is a terminal, is the user's: Open MPI makes one for every rank, and writes
        to its own output, which may be a file, what they say there."""
        return self.launcher != "openmpi"


def read_world(environment: Mapping[str, str] | None = None) -> World | None:
    """The world this process was started in, or None where no launcher started it (`environment` for tests).

    A job step of SLURM with a single task is no world: an interactive shell is one. LaunchError where a
    launcher's variables are set by halves or are not numbers.
    """
    variables = os.environ if environment is None else environment
    if any(name in variables for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _torchrun(variables)
    for launcher, names in _MPI.items():  # under SLURM, too: mpirun starts its daemons as tasks of a step
        if names[0] in variables and names[2] in variables:
            return _mpi(variables, launcher, names)
    if "SLURM_STEP_ID" in variables and variables.get("SLURM_NTASKS", "1") != "1":
        return _slurm(variables)
    for launcher, names in _MPI.items():
        if any(name in variables for name in names):
            return _mpi(variables, launcher, names)
    return None


def _torchrun(variables: Mapping[str, str]) -> World:
    _require(variables, "torchrun", _TORCHRUN)
    return World(
        rank=_integer(variables, "RANK"),
        world_size=_integer(variables, "WORLD_SIZE"),
        local_rank=_integer(variables, "LOCAL_RANK"),
        local_world_size=_integer(variables, "LOCAL_WORLD_SIZE"),
        master_addr=variables["MASTER_ADDR"],
        master_port=_integer(variables, "MASTER_PORT"),
        launcher="torchrun",
    )


def _slurm(variables: Mapping[str, str]) -> World:
    needed = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
    _require(variables, "slurm", (*needed, "SLURM_STEP_NODELIST", "SLURM_JOB_ID"))
    tasks = _tasks_per_node(variables["SLURM_STEP_TASKS_PER_NODE"])
    node = _integer(variables, "SLURM_NODEID")
    if node >= len(tasks):
        raise LaunchError(f"slurm: node {node} of {len(tasks)} in {tasks}; start the processes with one srun")
    first = _first_host(variables["SLURM_STEP_NODELIST"])
    return World(
        rank=_integer(variables, "SLURM_PROCID"),
        world_size=_integer(variables, "SLURM_NTASKS"),
        local_rank=_integer(variables, "SLURM_LOCALID"),
        local_world_size=tasks[node],
        master_addr=variables.get("MASTER_ADDR", _LOOPBACK if len(tasks) == 1 else first),
        master_port=_port(variables, variables["SLURM_JOB_ID"] + "." + variables["SLURM_STEP_ID"]),
        launcher="slurm",
    )


def _mpi(variables: Mapping[str, str], launcher: Launcher, names: tuple[str, str, str, str]) -> World:
    _require(variables, launcher, names)
    rank, world_size, local_rank, local_world_size = (_integer(variables, name) for name in names)
    address = _LOOPBACK if local_world_size == world_size else _address_of_mpirun(variables, rank)
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=variables.get("MASTER_ADDR", address),
        master_port=_port(variables, variables.get("PMIX_NAMESPACE", variables.get("PMI_ID", launcher))),
        launcher=launcher,
    )


def _address_of_mpirun(variables: Mapping[str, str], rank: int) -> str:
    """Of the node of Open MPI's mpirun, which is that of rank 0 unless a hosts file says otherwise; "" where it does,
    and where another launcher tells nothing.

    `"2089091072.0;tcp://192.0.2.2,172.17.0.1:40787;tcp6://[fd00::2]:47293"` -> `"192.0.2.2"`.
    """
    uri = variables.get("OMPI_MCA_orte_hnp_uri", "")
    if rank == 0 and variables.get("OMPI_MCA_orte_local_daemon_uri", "") != uri:
        return ""
    match = re.search(r"tcp://([^,:;]+)", uri)
    return "" if match is None else match[1]


def _require(variables: Mapping[str, str], launcher: Launcher, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in variables]
    if missing:
        present = [f"{name}={variables[name]}" for name in names if name in variables]
        raise LaunchError(
            f"{launcher} sets {', '.join(names)} together, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing beside {', '.join(present)}; "
            f"start with {launcher}, or unset the others to let shardwise start its own ranks"
        )


def _integer(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except ValueError as error:
        raise LaunchError(f"{name}={variables[name]!r} is not an integer; unset it or correct it") from error


def _port(variables: Mapping[str, str], job: str) -> int:
    """MASTER_PORT, or one derived from the job's name on which its processes agree and two jobs seldom."""
    if "MASTER_PORT" in variables:
        return _integer(variables, "MASTER_PORT")
    return 20000 + zlib.crc32(job.encode()) % 10000


def _tasks_per_node(text: str) -> list[int]:
    """`"2(x3),1"` -> `[2, 2, 2, 1]`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not like '2(x3),1'; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host(nodes: str) -> str:
    """`"gpu[007-009,12],cpu1"` -> `"gpu007"`."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def asked_threads(environment: Mapping[str, str] | None = None) -> int | None:
    """OMP_NUM_THREADS: threads of a process, as torch reads it too; None where it is not set (`environment` for
    tests)."""
    variables = os.environ if environment is None else environment
    told = variables.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # the first level of several
    if not told:
        return None
    if not told.isdecimal() or int(told) < 1:
        raise LaunchError(f"OMP_NUM_THREADS={told!r} is not a number of threads; use 1 or more, or unset it")
    return int(told)


def tell_open_mpi(parameters: Mapping[str, str]) -> None:
    """Parameters (MCA) that Open MPI reads when it starts in this process; those of mpirun's command line give way."""
    for name, value in parameters.items():
        os.environ[f"OMPI_MCA_{name}"] = value


def environment_snapshot() -> dict[str, str]:
    """A copy of the environment, to compare with a later one."""
    return dict(os.environ)


def child_environment(source_root: str) -> dict[str, str]:
    """The environment of the processes that shardwise starts on this machine.

    A copy of ours, without what a launcher told *us*; shardwise is found under `source_root`; gloo and NCCL
    stay on the loopback interface unless the user named another; asking whether there is a GPU must not open
    it before the fork.
    """
    told = (*_TORCHRUN, *(name for names in _MPI.values() for name in names))
    ours = {name: value for name, value in os.environ.items() if name not in told}
    paths = [source_root, *filter(None, [ours.get("PYTHONPATH")])]
    defaults = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    loopback = next((name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*", name)), None)
    if loopback is not None:
        defaults |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return {**defaults, **ours, "PYTHONPATH": os.pathsep.join(paths)}
