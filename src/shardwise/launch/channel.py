"""Two processes of one machine talking: short messages in order, each with values of any size.

A message is one packet of JSON on a Unix socket; a value travels as the descriptor of a file in memory
(`payload`), so a packet is never large and a sender never waits for a slow reader. It knows neither ranks nor
what a message means.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
from dataclasses import dataclass

from shardwise.launch.payload import pack, unpack

__all__ = ["Channel", "Message", "channel_pair"]

_MAX_PACKET_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Message:
    """What arrived: its kind, small JSON fields, and descriptors (the reader's to close)."""

    kind: str
    fields: dict[str, object]
    descriptors: tuple[int, ...]

    def take_value(self, index: int = 0) -> object:
        """A value that travelled with the message; each may be taken once."""
        descriptor = self.descriptors[index]
        try:
            return unpack(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Drops the values unread."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class Channel:
    """One end of a connection. `None` from `receive` means that the other end is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: str, descriptors: tuple[int, ...] = (), **fields: object) -> None:
        """Sends a message; the descriptors stay open here. BrokenPipeError where the other end is gone."""
        packet = json.dumps({"kind": kind, **fields}).encode()
        socket.send_fds(self._socket, [packet], list(descriptors))

    def send_values(self, kind: str, *values: object) -> None:
        """Sends a message with values of any size; LaunchError where one of them cannot be pickled."""
        descriptors: list[int] = []
        try:
            for value in values:
                descriptors.append(pack(value))
            self.send(kind, tuple(descriptors))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def readable(self, *, within_s: float = 0.0) -> bool:
        """True where `receive` would not wait."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            return bool(selector.select(within_s))

    def receive(self) -> Message | None:
        """Waits for the next message."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._socket, _MAX_PACKET_BYTES, 4)
        except ConnectionResetError:
            return None
        if not packet:
            return None
        fields: dict[str, object] = json.loads(packet)
        return Message(kind=str(fields.pop("kind")), fields=fields, descriptors=tuple(descriptors))

    def close(self) -> None:
        self._socket.close()


def channel_pair() -> tuple[Channel, socket.socket]:
    """A channel and the socket of its other end, whose descriptor may be given to another process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), theirs
