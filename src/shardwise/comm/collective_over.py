"""What moves the bytes of a group: memory that its ranks share where all live on one host, else its process group.

Collective throughout: every rank of the default group calls it, in the same order.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from shardwise.comm.clock import host_of_clock
from shardwise.comm.collective import Collective, ProcessGroupCollective
from shardwise.comm.hierarchical import HierarchicalCollective
from shardwise.comm.mpi_backend import may_share_memory, moves_host_memory
from shardwise.comm.ring import GroupTransport, RingCollective, TreeCollective
from shardwise.comm.same_host_meeting import meet
from shardwise.comm.shared_board import Board, is_possible, num_bytes_of
from shardwise.comm.shared_collective import SharedMemoryCollective
from shardwise.comm.shared_region import Descriptor, received, send
from shardwise.errors import LayoutError

__all__ = ["collective_over", "shared_memory_over"]


def collective_over(
    groups: Sequence[Sequence[int]],
    *,
    stack: contextlib.ExitStack,
    device: torch.device | str = "cpu",
    algorithm: str = "auto",
    host: str | None = None,
) -> Collective | None:
    """That of the first of `groups` that this rank is in, with its ranks in that order; None if it is in none.

    `groups` are all that there are, the same on every rank of the default group, each rank in one of them at most. What
    is opened is closed by `stack`. `algorithm`: "auto"; "ring", "tree" or "hierarchical", on all ranks of `groups`.
    Ranks with the same `host` are on one; by default it is what the operating system says of it. Raises `LayoutError`
    where the backend chooses its algorithms itself, and where hosts do not have as many ranks of a group.
    """
    own = _own_group(groups, stack)
    if algorithm == "hierarchical":
        return _hierarchical(groups, own, device, host, stack)
    if algorithm != "auto":
        return _point_to_point(own, algorithm)
    shared = None
    if torch.device(device).type == "cpu" and may_share_memory():
        shared = shared_memory_over(None if own is None else own[1], None if own is None else own[0], stack)
    if own is None:
        return None
    return shared or ProcessGroupCollective(own[0], device=device)


def _own_group(
    groups: Sequence[Sequence[int]], stack: contextlib.ExitStack
) -> tuple[dist.ProcessGroup, list[int]] | None:
    rank, own = dist.get_rank(), None
    for ranks in groups:
        group = dist.new_group(ranks, sort_ranks=False)
        if rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            stack.callback(dist.destroy_process_group, group)
            own = own or (group, list(ranks))
    return own


def _point_to_point(own: tuple[dist.ProcessGroup, list[int]] | None, algorithm: str) -> Collective | None:
    if not moves_host_memory():
        raise LayoutError(
            f'{dist.get_backend()} chooses its algorithms itself, but algorithm = "{algorithm}"; use "auto" or '
            '"hierarchical", or tell the backend (NCCL_ALGO)'
        )
    if own is None:
        return None
    made = RingCollective if algorithm == "ring" else TreeCollective
    return made(GroupTransport(own[0]), rank=own[0].rank(), size=own[0].size())


def _hierarchical(
    groups: Sequence[Sequence[int]],
    own: tuple[dist.ProcessGroup, list[int]] | None,
    device: torch.device | str,
    host: str | None,
    stack: contextlib.ExitStack,
) -> Collective | None:
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host_of_clock() if host is None else host)
    divided = [_by_host(ranks, hosts) for ranks in groups]
    inside = collective_over([ranks for group in divided for ranks in group], stack=stack, device=device)
    columns = [list(column) for group in divided for column in zip(*group, strict=True)]
    between = collective_over(columns, stack=stack, device=device)
    if own is None:
        return None
    assert inside is not None
    assert between is not None
    if between.size == 1:  # one host
        return inside
    if inside.size == 1:
        return between
    ranks = own[1]
    place_of = tuple(tuple(ranks.index(rank) for rank in each) for each in _by_host(ranks, hosts))
    return HierarchicalCollective(inside, between, place_of=place_of, rank=ranks.index(dist.get_rank()))


def _by_host(ranks: Sequence[int], hosts: Sequence[str]) -> list[list[int]]:
    """The ranks of a group on each host, in their order."""
    found: dict[str, list[int]] = {}
    for rank in ranks:
        found.setdefault(hosts[rank], []).append(rank)
    counts = sorted({len(each) for each in found.values()})
    if len(counts) > 1:
        raise LayoutError(
            f"a sum in two levels needs as many ranks of a group on every host, but of ranks {list(ranks)} one has "
            f'{counts[0]} and another {counts[-1]}; start as many on each, or use algorithm = "auto"'
        )
    return list(found.values())


def shared_memory_over(
    ranks: Sequence[int] | None,
    group: dist.ProcessGroup | None,
    stack: contextlib.ExitStack,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> SharedMemoryCollective | None:
    """That of the `ranks` of a process group, or of none; None on all of them where one does not reach all others.

    `meanwhile` is called now and then while this rank waits for others.
    """
    own = dist.get_rank()
    sockets = meet(ranks or ()) if dist.get_world_size() > 1 else {}
    if ranks is None or group is None:
        return None
    with contextlib.ExitStack() as open_sockets:
        for each in sockets.values():
            open_sockets.callback(each.close)
        if not _all_say(is_possible() and len(sockets) == len(ranks) - 1, group):
            return None
        options = group._get_backend(torch.device("cpu")).options
        timeout_s = float(options._timeout.total_seconds())
        by_place = {place: sockets[rank] for place, rank in enumerate(ranks) if rank != own}
        board = _board(ranks.index(own), by_place, timeout_s, meanwhile)
        made = None
        if board is not None:
            made = SharedMemoryCollective(rank=ranks.index(own), board=board, sockets=by_place)
        if not _all_say(made is not None and made.make_stages(), group):
            if made is not None:
                made.close()
            return None
        open_sockets.pop_all()
    assert made is not None
    stack.callback(made.close)
    return made


def _board(
    place: int, sockets: Mapping[int, socket.socket], timeout_s: float, meanwhile: Callable[[], None] | None
) -> Board | None:
    """Made by the rank at the first place, mapped by the others; None where it cannot be."""
    size = len(sockets) + 1
    for each in sockets.values():
        each.settimeout(None)  # a timeout of Python's would make sends wait, too
        limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))  # struct timeval
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    try:
        if place == 0:
            descriptor = Descriptor(0, num_bytes_of(size))
            region = descriptor.region
            for each in sockets.values():
                send(each, descriptor)
            descriptor.close()
        else:
            _, region = received(sockets[0])
    except (OSError, RuntimeError):
        for each in sockets.values():  # the others wait for it
            each.close()
        return None
    return Board(
        region,
        rank=place,
        size=size,
        sockets=sockets,
        timeout_s=timeout_s,
        looks=dist.get_world_size() <= len(os.sched_getaffinity(0)),
        meanwhile=meanwhile,
    )


def _all_say(here: bool, group: dist.ProcessGroup) -> bool:
    said = torch.tensor(int(here))
    dist.all_reduce(said, op=dist.ReduceOp.MIN, group=group)
    return bool(said.item())
