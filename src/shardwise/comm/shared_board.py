"""How far the ranks of a group are, on a page that all of them map: each writes its own row, and reads the others'.

    rank 0   arrived 7   done 6   calls … 5 6          7 calls begun, its part of 6 finished, what each call is about
    rank 1   arrived 6   done 6   calls … 5            waits for rank 0 no more, rank 0 for it in call 6

Who waits looks for a while, where every rank has a core, then sleeps until the other's number changes (futex(2)). A
rank that ends closes its sockets: who waits for it looks there, too. Numbers are aligned words, written in order and
seen in that order, as x86-64 does it. Knows numbers; refuses to know tensors.
"""

from __future__ import annotations

import ctypes
import platform
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from shardwise.comm.shared_region import Region

__all__ = ["CALLS", "Board", "Call", "is_possible", "num_bytes_of"]

CALLS = 256  # that may be under way at once
_FIELDS = 4  # of a call
_ARRIVED, _DONE, _FIRST_CALL = 0, 8, 16  # words of a row; the counters have a cache line each
_WORDS = _FIRST_CALL + CALLS * _FIELDS
_FUTEX, _WAIT, _WAKE = 202, 0, 1
_LOOK_S = 100e-6  # a wake-up takes half as long
_SLEEP_S = 0.02  # then sockets are looked at


class Call(NamedTuple):
    """What a rank has begun: a kind and size that must be alike on all ranks, and where its memory is."""

    kind: int
    num_bytes: int
    region: int
    offset: int


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def is_possible() -> bool:
    """Whether this machine has what a board needs."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and ctypes.sizeof(ctypes.c_void_p) == 8


def num_bytes_of(size: int) -> int:
    """Of a board of `size` ranks."""
    return size * _WORDS * 8


class Board:
    """One rank's view. `sockets` by place in the group, those of this rank to the others. `looks`: who waits looks
    before it sleeps, which is for ranks that have a core each; `meanwhile` is called now and then by who waits."""

    def __init__(
        self,
        region: Region,
        *,
        rank: int,
        size: int,
        sockets: Mapping[int, socket.socket],
        timeout_s: float,
        looks: bool = True,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        self._region = region  # keeps the memory
        self._base = region.memory.data_ptr()
        whole = (ctypes.c_uint64 * (size * _WORDS)).from_address(self._base)
        self._words = memoryview(whole).cast("B").cast("Q")
        self._rows: Final = [i * _WORDS for i in range(size)]
        self._own = rank * _WORDS
        self._others = [i for i in range(size) if i != rank]
        self._sockets = sockets
        self._timeout_s = timeout_s
        self._meanwhile = meanwhile
        self._look_s = _LOOK_S if looks else 0.0
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._timespec = _Timespec(0, int(_SLEEP_S * 1e9))
        self._hang_up = select.poll()
        for each in sockets.values():
            self._hang_up.register(each, select.POLLRDHUP)

    def begin(self, number: int, call: Call) -> None:
        """This rank has begun call `number`, and what it hands over is there."""
        at = self._own + _FIRST_CALL + number % CALLS * _FIELDS
        words = self._words
        words[at], words[at + 1], words[at + 2], words[at + 3] = call
        self._tell(_ARRIVED, number + 1)

    def finish(self, number: int) -> None:
        """This rank has done its part of call `number`."""
        self._tell(_DONE, number + 1)

    def call_of(self, place: int, number: int) -> Call:
        """What a rank has begun; for a call that it has."""
        at = self._rows[place] + _FIRST_CALL + number % CALLS * _FIELDS
        return Call(*self._words[at : at + _FIELDS])

    def have_begun(self, number: int) -> bool:
        """Whether all ranks have."""
        return all(self._words[self._rows[i] + _ARRIVED] > number for i in self._others)

    def have_finished(self, number: int) -> bool:
        """Whether all ranks have."""
        return all(self._words[self._rows[i] + _DONE] > number for i in self._others)

    def until_begun(self, number: int) -> None:
        """Wait for all ranks. RuntimeError if one is gone or silent."""
        self._until(_ARRIVED, number)

    def until_finished(self, number: int) -> None:
        """Wait for all ranks. RuntimeError if one is gone or silent."""
        self._until(_DONE, number)

    def _tell(self, counter: int, value: int) -> None:
        self._words[self._own + counter] = value
        self._syscall(_FUTEX, ctypes.c_void_p(self._base + 8 * (self._own + counter)), _WAKE, 1 << 30, None, None, 0)

    def _until(self, counter: int, number: int) -> None:
        for place in self._others:
            at = self._rows[place] + counter
            if self._words[at] <= number and not self._seen(at, number):
                self._sleep(at, number, place)

    def _seen(self, at: int, number: int) -> bool:
        """Look for a while."""
        if not self._look_s:
            return False
        words, limit = self._words, time.perf_counter() + self._look_s
        while words[at] <= number:
            if time.perf_counter() > limit:
                return False
        return True

    def _sleep(self, at: int, number: int, place: int) -> None:
        limit = time.monotonic() + self._timeout_s
        address, timeout = ctypes.c_void_p(self._base + 8 * at), ctypes.byref(self._timespec)
        while (seen := self._words[at]) <= number:
            low = ctypes.c_uint32(seen & 0xFFFFFFFF)  # of the word: this is a little-endian machine
            self._syscall(_FUTEX, address, _WAIT, low, timeout, None, 0)
            if self._words[at] > number:
                return
            if self._meanwhile is not None:
                self._meanwhile()
            gone = self._gone()
            if gone and self._words[at] <= number:  # what a rank has done before it ended counts
                raise RuntimeError(f"ranks at places {gone} of the group closed their sockets: they have ended")
            if time.monotonic() > limit:
                raise RuntimeError(f"the rank at place {place} of the group took longer than {self._timeout_s:g} s")

    def _gone(self) -> Sequence[int]:
        numbers = {number for number, _ in self._hang_up.poll(0)}
        return [place for place, each in self._sockets.items() if each.fileno() in numbers] if numbers else []
