"""How ranks of one host find each other: names exchanged over the process group, sockets connected and checked.

Knows who may be connected to whom, not what is sent. An abstract socket can be reached by every user of the host, so
each side looks at whose process the other is, and who connects shows a secret that the process group has carried.
"""

from __future__ import annotations

import dataclasses
import hmac
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from shardwise.comm.same_host_channel import Channel
from shardwise.errors import TransferError

__all__ = ["connect", "meet"]

_SECRET_BYTES = 32
_HELLO = struct.Struct(f"<{_SECRET_BYTES}sI")  # the secret of the rank that is called, the number of the one that calls
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred
_MEETING_S = 60.0

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Card:
    """What a rank tells all others. `host` is None where it cannot meet anybody."""

    host: tuple[str, ...] | None
    address: str
    secret: bytes = dataclasses.field(repr=False)
    peers: frozenset[int]

    def meets(self, other: _Card) -> bool:
        return self.host is not None and self.host == other.host


def connect(peers: Collection[int], *, timeout_s: float) -> dict[int, Channel]:
    """Channels to those of `peers` that name this rank too and live on this host. Collective over the default group.

    Raises `TransferError` where a peer on this host announced itself and does not answer.
    """
    return {rank: Channel(each, rank, timeout_s=timeout_s) for rank, each in meet(peers).items()}


def meet(peers: Collection[int]) -> dict[int, socket.socket]:
    """The same as connected sockets, by rank."""
    own = dist.get_rank()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        card = _announce(listener, frozenset(peers) - {own})
        cards: list[_Card] = _gathered(card)
        wanted = [r for r, other in enumerate(cards) if r in card.peers and own in other.peers and card.meets(other)]
        connected = _call(own, [rank for rank in wanted if rank < own], cards)
        try:
            callers = [rank for rank, called in enumerate(_gathered(frozenset(connected))) if own in called]
            connected |= _answer(listener, callers, card.secret)
        except BaseException:
            for each in connected.values():
                each.close()
            raise
    return dict(sorted(connected.items()))


def _announce(listener: socket.socket, peers: frozenset[int]) -> _Card:
    """Listen under a name that nobody can guess."""
    address = f"\0shardwise-{secrets.token_hex(16)}"
    host = _host()
    try:
        listener.bind(address)
        listener.listen(max(1, len(peers)))
    except OSError:
        host = None
    return _Card(host=host, address=address, secret=secrets.token_bytes(_SECRET_BYTES), peers=peers)


def _host() -> tuple[str, ...] | None:
    """What processes have in common that can share sockets and memory; None where there is no such thing."""
    if sys.platform != "linux":
        return None
    try:
        os.close(os.memfd_create("shardwise", os.MFD_CLOEXEC))
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/user"), str(os.getuid())
    except OSError:
        return None


def _gathered(mine: T) -> list[T]:
    everybody: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return cast(list[T], everybody)


def _call(own: int, ranks: Sequence[int], cards: Sequence[_Card]) -> dict[int, socket.socket]:
    """Connect to ranks that listen; those that cannot be reached are left out."""
    connected: dict[int, socket.socket] = {}
    for rank in ranks:
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            caller.settimeout(_MEETING_S)
            caller.connect(cards[rank].address)
            caller.sendall(_HELLO.pack(cards[rank].secret, own))
        except OSError:
            caller.close()
            continue
        connected[rank] = caller
    return connected


def _answer(listener: socket.socket, callers: Sequence[int], secret: bytes) -> dict[int, socket.socket]:
    """Accept the ranks that have called; they have already said hello. Strangers are hung up on."""
    answered: dict[int, socket.socket] = {}
    limit = time.monotonic() + _MEETING_S
    try:
        while missing := sorted(set(callers) - set(answered)):
            listener.settimeout(max(0.001, limit - time.monotonic()))
            caller, _ = listener.accept()
            rank = _recognised(caller, secret)
            if rank in missing:
                answered[rank] = caller
            else:
                caller.close()
    except BaseException as error:
        for each in answered.values():
            each.close()
        if isinstance(error, OSError):
            raise TransferError(
                f"ranks {missing} connected to this rank and cannot be accepted: {error}; run on separate hosts, or "
                "look at the limits of open files"
            ) from error
        raise
    return answered


def _recognised(caller: socket.socket, secret: bytes) -> int | None:
    """The rank that calls, if it is a process of this user that knows the secret."""
    credentials = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
        return None
    caller.settimeout(1.0)
    try:
        hello = caller.recv(_HELLO.size, socket.MSG_WAITALL)
    except OSError:
        return None
    if len(hello) != _HELLO.size:
        return None
    shown, rank = _HELLO.unpack(hello)
    return int(rank) if hmac.compare_digest(shown, secret) else None
