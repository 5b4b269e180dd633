"""Processes that another launcher started meet where it says, on loopback where that is enough."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from shardwise.launch import RankContext, RankPool, init_process_group

BY_A_LAUNCHER = """
import torch, torch.distributed as dist
from shardwise.launch import context_of_world, init_process_group, read_world
context = context_of_world(read_world())
init_process_group(context, timeout_s=30)
total = torch.tensor(float(context.rank + 1))
dist.all_reduce(total)
assert total == 3, total
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_processes_of_an_mpi_launcher_meet() -> None:
    common = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in ("0", "1"):
        own = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        environment = os.environ | common | own
        processes.append(subprocess.Popen([sys.executable, "-c", BY_A_LAUNCHER], env=environment))
    assert [process.wait(60) for process in processes] == [0, 0]


def listening_addresses(context: RankContext, port: int) -> set[str]:
    """Hexadecimal local addresses on which somebody listens on `port`, as the kernel tells them."""
    meeting = RankContext(
        rank=context.rank, world_size=2, local_rank=context.rank, rendezvous=f"tcp://127.0.0.1:{port}"
    )
    init_process_group(meeting, timeout_s=20)
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for fields in (line.split() for line in list(lines)[1:]):
                address, local_port = fields[1].split(":")
                if fields[3] == "0A" and int(local_port, 16) == port:  # 0A: listening
                    found.add(address)
    return found


def test_a_meeting_on_loopback_listens_nowhere_else() -> None:
    with RankPool(2, process_group_timeout_s=None, num_threads=1) as pool:
        heard = pool.run(listening_addresses, free_port(), timeout_s=30)
    assert heard[0] == {"0100007F"}  # 127.0.0.1
