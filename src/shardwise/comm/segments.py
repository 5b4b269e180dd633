"""Memory that two processes of one host share: made here, mapped there, and used again. Knows bytes, no tensors.

    writer   memfd ── mapped ── filled ──────────────┐  (segment 3, 700 bytes)     ┌── filled again
    reader             mapped once, from the same fd ┴── copied out ── (3 is free) ─┘

A segment has no name anywhere: it is gone when both processes have let go of it, however they end.
"""

from __future__ import annotations

import ctypes
import os

import torch

__all__ = ["SEGMENT_BYTES", "Outbox", "Segment"]

SEGMENT_BYTES = 1 << 20  # a larger tensor travels in pieces of this size: one is copied out while the next is filled
_KEPT = 32  # segments that stay mapped while nothing is under way


class Segment:
    """`SEGMENT_BYTES` of memory behind a file descriptor, which may be closed afterwards. OSError if it cannot be."""

    def __init__(self, descriptor: int) -> None:
        path = f"/proc/self/fd/{descriptor}"  # torch keeps no descriptor of its own, mmap.mmap does
        self._memory = torch.from_file(path, shared=True, size=SEGMENT_BYTES, dtype=torch.uint8)
        self.address = self._memory.data_ptr()


class Outbox:
    """The segments that one process fills for another; both know each by its number."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._free: list[int] = []  # the last one freed is the first one used: it is still in the cache
        self._made = 0

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def is_plenty(self) -> bool:
        """Whether more segments are free than are worth keeping."""
        return len(self._free) > _KEPT

    def make(self) -> tuple[int, int]:
        """A new segment, free: its number, and a descriptor that the caller sends to the reader and closes."""
        descriptor = os.memfd_create("shardwise", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, SEGMENT_BYTES)
            self._segments[self._made] = Segment(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._free.append(self._made)
        self._made += 1
        return self._made - 1, descriptor

    def fill(self, source: int, num_bytes: int) -> int:
        """Copy from an address into a free segment; its number."""
        number = self._free.pop()
        ctypes.memmove(self._segments[number].address, source, num_bytes)
        return number

    def release(self, number: int) -> None:
        """The reader has copied it out."""
        self._free.append(number)

    def drop(self) -> int:
        """Unmap the free segment that was not used for longest; its number."""
        number = self._free.pop(0)
        del self._segments[number]
        return number

    def close(self) -> None:
        self._segments.clear()
        self._free.clear()
