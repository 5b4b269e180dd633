"""Collectives of sends and receives: around a ring, or up and down a tree. Asked for by name; `auto` uses neither.

    ring   part i goes around once, each rank adds its own, and around again         2 (n - 1) steps of 1/n each
    tree   pairs add, then pairs of pairs, up to rank 0; the sum goes back down      2 log2 n steps of the whole

(Patarasuk and Yuan 2009; Thakur, Rabenseifner and Gropp 2005.) Every element is added in one order, on one rank, so all
ranks have the same bits. The first step begins with the call, the others are taken by `wait()`: there are no threads.
Knows a transport; refuses to know parameters.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.distributed as dist

from shardwise.comm.collective import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, All
from shardwise.comm.point_to_point import Transport, Waitable

__all__ = ["GroupTransport", "RingCollective", "TreeCollective"]


@dataclasses.dataclass(frozen=True, slots=True)
class GroupTransport:
    """A process group's own sends and receives; peers are places in the group."""

    group: dist.ProcessGroup

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Send a contiguous tensor."""
        work: Waitable | None = dist.isend(tensor, group=self.group, group_dst=peer)
        assert work is not None
        return work

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Have the next message of a peer put into a contiguous tensor."""
        work: Waitable | None = dist.irecv(tensor, group=self.group, group_src=peer)
        assert work is not None
        return work


class RingCollective:
    """A `Collective` over a transport whose peers are places in the group. Messages of a pair keep their order, so
    calls are waited for in one order on all ranks."""

    def __init__(self, transport: Transport, *, rank: int, size: int) -> None:
        self._transport: Final = transport
        self._rank: Final = rank
        self._size: Final = size
        self._sent: collections.Counter[str] = collections.Counter()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        return self._sent

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Collective`."""
        return torch.empty(numel, dtype=dtype)

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_REDUCE] += flat.nbytes
        part = -(-flat.numel() // self._size)
        parts = [flat[i * part : (i + 1) * part] for i in range(self._size)]
        first = self._step(parts[self._rank - 1], torch.empty_like(parts[self._rank - 2]))

        def rest() -> None:
            self._add_around(parts, first)
            self._send_around(parts, self._step(parts[self._rank], parts[self._rank - 1]))

        return _Steps(rest)

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[REDUCE_SCATTER] += flat.nbytes
        parts = list(flat.view(self._size, -1).unbind())
        first = self._step(parts[self._rank - 1], torch.empty_like(out))

        def rest() -> None:
            self._add_around(parts, first)
            if out.data_ptr() != parts[self._rank].data_ptr():
                out.copy_(parts[self._rank])

        return _Steps(rest)

    def all_gather(self, own: torch.Tensor, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_GATHER] += flat.nbytes
        parts = list(flat.view(self._size, -1).unbind())
        if own.data_ptr() != parts[self._rank].data_ptr():
            parts[self._rank].copy_(own)
        first = self._step(parts[self._rank], parts[self._rank - 1])
        return _Steps(lambda: self._send_around(parts, first))

    def all_to_all(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`: every pair for itself."""
        self._sent[ALL_TO_ALL] += flat.nbytes
        theirs, own = out.view(self._size, -1), flat.view(self._size, -1)
        theirs[self._rank].copy_(own[self._rank])
        others = [(self._rank + shift) % self._size for shift in range(1, self._size)]
        works = [self._transport.irecv(theirs[i], i) for i in others]
        return All([*works, *(self._transport.isend(own[i], i) for i in others)])

    def _step(self, to_next: torch.Tensor, from_previous: torch.Tensor) -> _Step:
        received = self._transport.irecv(from_previous, (self._rank - 1) % self._size)
        return _Step(received, self._transport.isend(to_next, (self._rank + 1) % self._size), from_previous)

    def _add_around(self, parts: list[torch.Tensor], step: _Step) -> None:
        """Part `rank` becomes the sum; the first step sends part rank - 1."""
        for turn in range(2, self._size + 1):
            came = step.wait()
            part = parts[(self._rank - turn) % self._size]
            part.add_(came)
            if turn < self._size:
                step = self._step(part, torch.empty_like(parts[(self._rank - turn - 1) % self._size]))

    def _send_around(self, parts: list[torch.Tensor], step: _Step) -> None:
        """Every part comes from who has it; the first step sends part `rank`."""
        for turn in range(1, self._size):
            step.wait()
            if turn < self._size - 1:
                came = parts[(self._rank - turn) % self._size]
                step = self._step(came, parts[(self._rank - turn - 1) % self._size])


class TreeCollective(RingCollective):
    """Sums up and down a binomial tree; all else as around a ring."""

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_REDUCE] += flat.nbytes
        parent, children = self._relatives()
        posted = [(self._transport.irecv(scratch, child), scratch) for child, scratch in self._scratch(flat, children)]
        first = None if children or parent is None else self._transport.isend(flat, parent)

        def rest() -> None:
            for work, scratch in posted:  # the nearest first: it stands for the fewest ranks
                work.wait()
                flat.add_(scratch)
            up = first
            if parent is not None:
                up = up or self._transport.isend(flat, parent)
                up.wait()
                self._transport.irecv(flat, parent).wait()
            for work in [self._transport.isend(flat, child) for child in reversed(children)]:
                work.wait()

        return _Steps(rest)

    def _relatives(self) -> tuple[int | None, list[int]]:
        """Who adds this rank's sum, and whose sums this rank adds, nearest first."""
        children: list[int] = []
        distance = 1
        while distance < self._size:
            if self._rank & distance:
                return self._rank - distance, children
            if self._rank + distance < self._size:
                children.append(self._rank + distance)
            distance *= 2
        return None, children

    @staticmethod
    def _scratch(flat: torch.Tensor, children: list[int]) -> list[tuple[int, torch.Tensor]]:
        return [(child, torch.empty_like(flat)) for child in children]


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """One message each way."""

    received: Waitable
    sent: Waitable
    came: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.received.wait()
        self.sent.wait()
        return self.came


@dataclasses.dataclass(slots=True)
class _Steps:
    """Steps that are taken by whoever waits, once."""

    rest: Callable[[], None]
    done: bool = False

    def wait(self) -> None:
        if not self.done:
            self.done = True
            self.rest()
