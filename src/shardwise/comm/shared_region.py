"""Memory that several processes of one host map: made in one of them, its descriptor sent to the others.

A region has no name anywhere: it is gone when nobody has a tensor in it any more, however the processes end. Knows
bytes and sockets; refuses to know ranks and what lies in the memory.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import Final

import torch

__all__ = ["Descriptor", "Region", "received", "send"]

_NOTE = struct.Struct("<QQ")  # number of the region, bytes
_ROOM = socket.CMSG_SPACE(array.array("i", [0]).itemsize)


class Region:
    """`num_bytes` behind a descriptor, which may be closed afterwards; zeros when made. OSError if it cannot be."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        path = f"/proc/self/fd/{descriptor}"  # torch keeps no descriptor of its own
        self.memory: Final = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)

    def flat(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """What lies at a byte offset."""
        return self.memory[offset : offset + numel * dtype.itemsize].view(dtype)


class Descriptor:
    """A region that this process has made: open until `close`."""

    def __init__(self, number: int, num_bytes: int) -> None:
        self.number, self.num_bytes = number, num_bytes
        self.fileno = os.memfd_create("shardwise", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fileno, 0, num_bytes)  # here an error, at the first store it were a signal
            self.region = Region(self.fileno, num_bytes)
        except BaseException:
            os.close(self.fileno)
            raise

    def close(self) -> None:
        os.close(self.fileno)


def send(to: socket.socket, descriptor: Descriptor) -> bool:
    """Send it, unless that would wait; whether it is sent. The peer may be gone: that is found by who waits for it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor.fileno]))]
    try:
        to.sendmsg([_NOTE.pack(descriptor.number, descriptor.num_bytes)], rights, socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        return True
    except OSError:  # the socket is full, or too many descriptors are under way
        return False
    return True


def received(from_: socket.socket) -> tuple[int, Region]:
    """The next region that the peer has sent, and its number. RuntimeError if the peer is gone or silent."""
    data, rights, _, _ = from_.recvmsg(_NOTE.size, _ROOM, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC)
    descriptors = [number for _, _, each in rights for number in array.array("i", each)]
    if len(data) < _NOTE.size:
        raise RuntimeError("a rank of this host closed its socket: it has ended")
    if not descriptors:  # the kernel drops what this process may not open
        raise RuntimeError("shared memory did not arrive: too many open files; raise `ulimit -n`")
    number, num_bytes = _NOTE.unpack(data)
    try:
        return number, Region(descriptors[0], num_bytes)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
