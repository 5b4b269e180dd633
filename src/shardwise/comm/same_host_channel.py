"""Bytes between two processes of one host, in order, without ever waiting for the reader. Knows no ranks but its peer.

    socket    ─ free 4 ─ new 7 (+ its descriptor) ─ piece: 1 MiB in 7 ─ piece: 300 in 2 ─ piece: 24 here, "..." ─▶
    segments  7 ▓▓▓▓▓▓▓▓   2 ▓░░░░░░░   4 ░░░░░░░░

Small payloads travel in the socket, others in shared segments. What the socket does not take at once is kept and
written by later calls; by Linux' defaults it takes over 300 messages that nobody reads. What arrives before anybody
asked for it stays where it is.
"""

from __future__ import annotations

import array
import collections
import ctypes
import dataclasses
import fcntl
import os
import socket
import struct
import sys
import termios
from typing import Final

from shardwise.comm.segments import SEGMENT_BYTES, Outbox, Segment

__all__ = ["INLINE_BYTES", "Channel", "Receipt"]

INLINE_BYTES = 8 << 10  # above it, a segment and a note cost less than two copies in the kernel

_NOTE = struct.Struct("<IIQQ")  # kind, segment, bytes of this piece, bytes of the whole message
_INLINE, _IN_SEGMENT, _NEW, _FREE, _DROP = range(5)
_FREED_AT_ONCE = 8  # notes of free segments ride with the next payload, unless this many wait
_BUFFER_BYTES = 1 << 16
_SOCKET_BYTES = 4 << 20
_UNREAD_BYTES = (
    100_000  # of payload at most: the least that a socket holds is 208 KiB, and a note takes 768 bytes of it
)
_NOTE_BYTES = 768  # see above
_ANCILLARY_BYTES = socket.CMSG_SPACE(array.array("i", [0]).itemsize)
_NOW = socket.MSG_DONTWAIT
_GONE = (BrokenPipeError, ConnectionResetError)


@dataclasses.dataclass(slots=True)
class Receipt:
    """Where the next message is to be put: `num_bytes` at `address`, which is alive as long as `keep`."""

    address: int
    num_bytes: int
    keep: object
    arrived: int = 0
    done: bool = False
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """A message, or part of one: where it lies, and in which segment if in one."""

    source: int | bytes
    segment: int | None
    num_bytes: int
    total: int


class Channel:
    """One end of a connected AF_UNIX stream socket, which it owns. `timeout_s` bounds a silent `read`."""

    def __init__(self, connected: socket.socket, peer: int, *, timeout_s: float) -> None:
        self.peer: Final = peer
        self.closed_by_peer = False
        self.written = 0  # bytes that the socket has taken, of
        self.posted = 0  # bytes that it was to take
        self._socket = connected
        self._socket.settimeout(None)
        limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))  # struct timeval
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)  # the kernel lowers it
        self._outbox = Outbox()
        self._mapped: dict[int, Segment] = {}
        self._unwritten: collections.deque[tuple[bytes, int | None]] = collections.deque()
        self._receipts: collections.deque[Receipt] = collections.deque()
        self._early: collections.deque[_Piece] = collections.deque()
        self._freed: list[int] = []
        self._descriptors: collections.deque[int] = collections.deque()
        self._unread = 0  # no less than what the socket holds of ours
        self._line = memoryview(bytearray(_NOTE.size + INLINE_BYTES))
        self._line_base = ctypes.addressof(ctypes.c_char.from_buffer(self._line))
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._filled = 0

    @property
    def has_unwritten(self) -> bool:
        return self.written < self.posted

    def fileno(self) -> int:
        return self._socket.fileno()

    # -- writing --------------------------------------------------------------------------------

    def send(self, address: int, num_bytes: int) -> int:
        """Copy a message away; it is on its way once `written` has reached the number returned."""
        if num_bytes <= INLINE_BYTES and self._has_room(num_bytes):
            _NOTE.pack_into(self._line, 0, _INLINE, 0, num_bytes, num_bytes)
            ctypes.memmove(self._line_base + _NOTE.size, address, num_bytes)
            line = self._line[: _NOTE.size + num_bytes]
            self._post(self._free_notes() + line if self._freed else line)
            return self.posted
        for offset in range(0, max(1, num_bytes), SEGMENT_BYTES):  # nothing at all is one piece
            piece = min(SEGMENT_BYTES, num_bytes - offset)
            self._find_segment()
            segment = self._outbox.fill(address + offset, piece)
            self._post(self._free_notes() + _NOTE.pack(_IN_SEGMENT, segment, piece, num_bytes))
        return self.posted

    def flush(self) -> None:
        """Write what the socket takes now of what it did not take before."""
        while self._unwritten:
            data, descriptor = self._unwritten[0]
            taken = self._write(data, descriptor)
            if taken == 0:
                return
            if taken < len(data):  # a descriptor travels with the first byte
                self._unwritten[0] = (data[taken:], None)
                return
            self._unwritten.popleft()

    def _has_room(self, num_bytes: int) -> bool:
        """Whether the socket takes another inline payload. The kernel is asked when it might not, not every time."""
        needed = 2 * num_bytes  # the kernel rounds up
        if self._unread + needed >= _UNREAD_BYTES:
            self._unread = self._unread_bytes()
            if self._unread + needed >= _UNREAD_BYTES:
                return False
        self._unread += needed
        return True

    def _unread_bytes(self) -> int:
        """What the socket holds of ours, with what the kernel needs around it."""
        return int.from_bytes(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def _find_segment(self) -> None:
        if self._outbox.has_free:
            return
        self.read(wait=False)
        if not self._outbox.has_free:
            number, descriptor = self._outbox.make()
            self._post(_NOTE.pack(_NEW, number, 0, 0), descriptor)

    def _post(self, data: bytes | memoryview, descriptor: int | None = None) -> None:
        self.posted += len(data)
        self._unread += _NOTE_BYTES
        if self._unwritten:
            self.flush()
        taken = 0 if self._unwritten else self._write(data, descriptor)
        if taken < len(data):  # a descriptor travels with the first byte
            self._unwritten.append((bytes(data[taken:]), None if taken else descriptor))

    def _write(self, data: bytes | memoryview, descriptor: int | None) -> int:
        if self.closed_by_peer:
            return 0
        try:
            if descriptor is None:
                taken = self._socket.send(data, _NOW)
            else:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
                taken = self._socket.sendmsg([data], rights, _NOW)
                os.close(descriptor)
        except BlockingIOError:
            return 0
        except _GONE:
            self.closed_by_peer = True
            return 0
        self.written += taken
        return taken

    def _free_notes(self) -> bytes:
        if not self._freed:
            return b""
        notes = b"".join(_NOTE.pack(_FREE, segment, 0, 0) for segment in self._freed)
        self._freed.clear()
        return notes

    # -- reading --------------------------------------------------------------------------------

    def post(self, receipt: Receipt) -> None:
        """The next message that has no receipt yet belongs to this one; parts of it may have arrived."""
        self._receipts.append(receipt)
        while self._early and self._receipts:
            piece = self._early.popleft()
            self._put(piece)

    def read(self, *, wait: bool) -> bool:
        """Take what has arrived; whether anything had, or the peer is found gone. With `wait`, until something does,
        but no longer than the timeout."""
        try:
            flags = socket.MSG_CMSG_CLOEXEC if wait else socket.MSG_CMSG_CLOEXEC | _NOW
            count, rights, _, _ = self._socket.recvmsg_into([self._buffer[self._filled :]], _ANCILLARY_BYTES, flags)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            count, rights = 0, []
        self._descriptors.extend(number for _, _, data in rights for number in array.array("i", data))
        if count == 0:
            self.closed_by_peer = True
            return True
        self._interpret(self._filled + count)
        return True

    def _interpret(self, end: int) -> None:
        position = 0
        while end - position >= _NOTE.size:
            kind, segment, num_bytes, total = _NOTE.unpack_from(self._buffer, position)
            after = position + _NOTE.size
            if kind == _INLINE:
                if end - after < num_bytes:
                    break
                self._arrived(_Piece(self._base + after, None, num_bytes, total))
                after += num_bytes
            elif kind == _IN_SEGMENT:
                self._arrived(_Piece(self._mapped[segment].address, segment, num_bytes, total))
            elif kind == _FREE:
                self._released(segment)
            elif kind == _NEW:
                self._map(segment)
            else:
                del self._mapped[segment]
            position = after
        if 0 < position < end:
            self._buffer[: end - position] = bytes(self._buffer[position:end])
        self._filled = end - position

    def _arrived(self, piece: _Piece) -> None:
        if self._receipts:
            self._put(piece)
        elif piece.segment is None:  # the buffer is needed again
            here = ctypes.string_at(piece.source, piece.num_bytes)
            self._early.append(dataclasses.replace(piece, source=here))
        else:
            self._early.append(piece)

    def _put(self, piece: _Piece) -> None:
        receipt = self._receipts[0]
        if piece.total == receipt.num_bytes:
            ctypes.memmove(receipt.address + receipt.arrived, piece.source, piece.num_bytes)
        else:
            receipt.error = f"a message of {piece.total} bytes arrived where {receipt.num_bytes} bytes were expected"
        receipt.arrived += piece.num_bytes
        if receipt.arrived == piece.total:
            receipt.done = True
            self._receipts.popleft()
        if piece.segment is not None:
            self._freed.append(piece.segment)
            if len(self._freed) >= _FREED_AT_ONCE:
                self._post(self._free_notes())

    def _map(self, number: int) -> None:
        if not self._descriptors:  # the kernel drops what this process may not open
            raise RuntimeError("a shared segment did not arrive: too many open files; raise `ulimit -n`")
        descriptor = self._descriptors.popleft()
        self._mapped[number] = Segment(descriptor)
        os.close(descriptor)

    def _released(self, segment: int) -> None:
        self._outbox.release(segment)
        if self._outbox.is_plenty:
            self._post(_NOTE.pack(_DROP, self._outbox.drop(), 0, 0))

    def close(self) -> None:
        """Let go of socket and segments. What the peer has not read yet it still can."""
        self._socket.close()
        descriptors = [descriptor for _, descriptor in self._unwritten if descriptor is not None]
        for descriptor in (*descriptors, *self._descriptors):
            os.close(descriptor)
        self._unwritten.clear()
        self._descriptors.clear()
        self._mapped.clear()
        self._early.clear()
        self._receipts.clear()
        self._outbox.close()
