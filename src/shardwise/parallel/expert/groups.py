"""The ranks that divide experts, and what they exchange: rows of bytes, uneven counts. Knows no experts.

In a run they are processes, in a proof threads; the code that dispatches is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from shardwise.comm.point_to_point import Transport, Waitable
from shardwise.parallel.tensor.threads import on_threads

__all__ = ["ExpertGroup", "ProcessExpertGroup", "SameHostExpertGroup", "on_expert_threads"]

Result = TypeVar("Result")
_DEADLINE_SECONDS = 60.0


class ExpertGroup(Protocol):
    """The ranks that divide experts, seen from one of them. Calls stand in the same order on all of them."""

    sent_bytes: int  # to other ranks, so far

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def headers(self, own: torch.Tensor) -> torch.Tensor:
        """(size, n), int64: row i goes to rank i; row i of the answer came from rank i."""
        ...

    def rows(self, own: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """(sum(sent), width) in the order of the ranks that get them -> (sum(received), width) in the order of those
        that sent them."""
        ...


class ProcessExpertGroup:
    """An `ExpertGroup` over a process group of which this process is a member."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = group.rank()
        self._size = group.size()
        self.sent_bytes = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def headers(self, own: torch.Tensor) -> torch.Tensor:
        """Row i to rank i."""
        self.sent_bytes += own.nbytes * (self._size - 1) // self._size
        received = torch.empty_like(own)
        dist.all_to_all_single(received, own, group=self._group)
        return received

    def rows(self, own: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Uneven counts; what stays on this rank is copied."""
        got = own.new_empty((sum(received), *own.shape[1:]))
        self.sent_bytes += _bytes_away(own, sent, self._rank)
        dist.all_to_all_single(got, own.contiguous(), list(received), list(sent), group=self._group)
        return got


class SameHostExpertGroup:
    """An `ExpertGroup` over a transport that reaches all its ranks, which no one else uses between them."""

    def __init__(self, transport: Transport, ranks: Sequence[int], rank: int) -> None:
        """`ranks` in their order, `rank` this process's own among them: numbers of the transport."""
        self._transport = transport
        self._ranks = tuple(ranks)
        self._rank = self._ranks.index(rank)
        self.sent_bytes = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._ranks)

    def headers(self, own: torch.Tensor) -> torch.Tensor:
        """Row i to rank i."""
        ones = [1] * self.size
        return self.rows(own, ones, ones)

    def rows(self, own: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Uneven counts; what stays on this rank is copied."""
        got = own.new_empty((sum(received), *own.shape[1:]))
        self.sent_bytes += _bytes_away(own, sent, self._rank)
        outgoing, incoming = _parts(own.contiguous(), sent), _parts(got, received)
        works: list[Waitable] = []
        for i, (there, here) in enumerate(zip(outgoing, incoming, strict=True)):
            if i == self._rank:
                here.copy_(there)
                continue
            if there.numel():
                works.append(self._transport.isend(there, self._ranks[i]))
            if here.numel():
                works.append(self._transport.irecv(here, self._ranks[i]))
        for work in works:
            work.wait()
        return got


def _parts(rows: torch.Tensor, counts: Sequence[int]) -> Sequence[torch.Tensor]:
    parts: Sequence[torch.Tensor] = rows.split(list(counts))  # type: ignore[no-untyped-call]
    return parts


class _ThreadExpertGroup:
    def __init__(self, rank: int, slots: list[tuple[torch.Tensor, ...]], barrier: threading.Barrier) -> None:
        self._rank = rank
        self._slots = slots
        self._barrier = barrier
        self.sent_bytes = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._slots)

    def headers(self, own: torch.Tensor) -> torch.Tensor:
        """Row i to thread i."""
        return torch.stack(self._exchanged(own.unbind(0)))

    def rows(self, own: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """As processes do; counts that do not agree are an error."""
        self.sent_bytes += _bytes_away(own, sent, self._rank)
        got = self._exchanged(_parts(own, sent))
        if [part.shape[0] for part in got] != list(received):
            raise ValueError(f"rank {self._rank} expects {list(received)} rows and gets {[p.shape[0] for p in got]}")
        return torch.cat(got)

    def _exchanged(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._slots[self._rank] = tuple(part.detach() for part in parts)
        self._barrier.wait(_DEADLINE_SECONDS)
        got = [slot[self._rank].clone() for slot in self._slots]
        self._barrier.wait(_DEADLINE_SECONDS)  # until all have read, nobody puts the next ones into the slots
        return got


def on_expert_threads(size: int, work: Callable[[ExpertGroup], Result]) -> list[Result]:
    """`work(group)` on `size` threads at once; their results in order. Raises what the first to fail raised."""
    slots: list[tuple[torch.Tensor, ...]] = [()] * size
    barrier = threading.Barrier(size)

    def run(rank: int) -> Result:
        try:
            return work(_ThreadExpertGroup(rank, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    return on_threads(size, lambda group: run(group.rank))


def _bytes_away(own: torch.Tensor, sent: Sequence[int], rank: int) -> int:
    """What of `own` goes to other ranks."""
    return (sum(sent) - sent[rank]) * own.shape[1:].numel() * own.element_size()
