"""The ranks of a unit as threads of one process. Knows meetings; the whole of a proof runs on it.

A rank that raises, or ends, ends at once whoever waits for it: nobody waits for what will not come.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["ThreadGroup", "on_threads"]

Result = TypeVar("Result")
_DEADLINE_SECONDS = 60.0


class _Broken(Exception):  # noqa: N818  not what went wrong, but its consequence
    """A rank was waited for, and will not come."""


class _Meeting:
    """Where all ranks wait for each other, again and again, until one of them leaves for good."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self._here = 0
        self._round = 0
        self._over = False
        self._gone: set[int] = set()
        self._mail: dict[tuple[int, int], collections.deque[torch.Tensor]] = {}
        self.late = False

    def wait(self) -> None:
        """Until all ranks are here. Raises `_Broken` where one of them has left, or does not come in time."""
        with self._changed:
            if self._over:
                raise _Broken
            mine = self._round
            self._here += 1
            if self._here == self._size:
                self._here, self._round = 0, mine + 1
                self._changed.notify_all()
            elif not self._changed.wait_for(lambda: self._over or self._round > mine, _DEADLINE_SECONDS):
                self.late = True
            if self._round == mine:
                raise _Broken

    def leave(self, rank: int) -> None:
        """Never to come again."""
        with self._changed:
            self._over = True
            self._gone.add(rank)
            self._changed.notify_all()

    def post(self, tensor: torch.Tensor, sender: int, receiver: int) -> None:
        """Lay a tensor down for one rank, behind what the sender has laid down for it before."""
        with self._changed:
            self._mail.setdefault((sender, receiver), collections.deque()).append(tensor)
            self._changed.notify_all()

    def take(self, sender: int, receiver: int) -> torch.Tensor:
        """The next tensor of a sender. Raises `_Broken` where it has left, or lays down none in time."""
        with self._changed:
            mail = self._mail.setdefault((sender, receiver), collections.deque())
            if not self._changed.wait_for(lambda: mail or sender in self._gone, _DEADLINE_SECONDS):
                self.late = True
            if not mail:
                raise _Broken
            return mail.popleft()


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    """A tensor that is copied."""

    def wait(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, slots=True)
class _Awaited:
    """A tensor that is to be put into another."""

    meeting: _Meeting
    target: torch.Tensor
    sender: int
    receiver: int

    def wait(self) -> None:
        given = self.meeting.take(self.sender, self.receiver)
        if (given.shape, given.dtype) != (self.target.shape, self.target.dtype):
            raise ValueError(
                f"rank {self.sender} sent {given.dtype} {tuple(given.shape)}, and rank {self.receiver} expected "
                f"{self.target.dtype} {tuple(self.target.shape)}"
            )
        self.target.copy_(given)


class ThreadGroup:
    """A `TensorGroup`: one rank's view of slots that all ranks share."""

    def __init__(self, rank: int, slots: list[torch.Tensor | None], meeting: _Meeting) -> None:
        self._rank = rank
        self._slots = slots
        self._meeting = meeting

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._slots)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum in the order of the ranks, so the same bits on each."""
        return self._combined(tensor, torch.Tensor.add_)

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest elements."""
        return self._combined(tensor, lambda total, other: torch.maximum(total, other, out=total))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors in order."""
        return self._exchanged(tensor, torch.stack)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' blocks for this one, in the order of the ranks."""
        return self._exchanged(tensor, lambda given: torch.stack([each[self._rank] for each in given]).sum(0))

    def isend(self, tensor: torch.Tensor, peer: int) -> _Sent:
        """Send to one rank of the group; copied, so the tensor may be written at once."""
        self._meeting.post(tensor.detach().clone(), self._rank, peer)
        return _Sent()

    def irecv(self, tensor: torch.Tensor, peer: int) -> _Awaited:
        """Have the next tensor of one rank of the group put into this one. Wait in the order of the calls."""
        return _Awaited(self._meeting, tensor, peer, self._rank)

    def _exchanged(self, tensor: torch.Tensor, combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        self._slots[self._rank] = tensor.detach()
        self._meeting.wait()
        given = [slot for slot in self._slots if slot is not None]
        if any(slot.shape != tensor.shape for slot in given):
            raise ValueError(f"ranks exchange tensors of one shape, not of {[tuple(s.shape) for s in given]}")
        out = combine(given)
        self._meeting.wait()
        return out

    def _combined(
        self, tensor: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        self._slots[self._rank] = tensor.detach()
        self._meeting.wait()
        given = [slot for slot in self._slots if slot is not None]
        if any(slot.shape != tensor.shape for slot in given):
            raise ValueError(f"ranks sum tensors of one shape, and these have {[tuple(s.shape) for s in given]}")
        total = given[0].clone()
        for other in given[1:]:
            total = combine(total, other)
        self._meeting.wait()  # until all have read, nobody puts the next one into the slots
        return total


def on_threads(size: int, work: Callable[[ThreadGroup], Result]) -> list[Result]:
    """`work(group)` on `size` ranks at once; their results in order. Raises what the first rank to fail raised.

    The ranks share torch's threads: a pool of all cores for each of them would wait for itself.
    """
    num_threads = torch.get_num_threads()
    slots: list[torch.Tensor | None] = [None] * size
    meeting = _Meeting(size)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        torch.set_num_threads(max(1, num_threads // size))  # of this thread
        try:
            results[rank] = work(ThreadGroup(rank, slots, meeting))
        except BaseException as error:
            if not isinstance(error, _Broken):
                errors.append(error)
        meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(num_threads)  # of threads to come
    if errors:
        raise errors[0]
    if len(results) < size:
        told = f"did not come in {_DEADLINE_SECONDS:g} s" if meeting.late else "had ended without it"
        raise TimeoutError(f"{size} ranks meet in every sum, and one of them {told}")
    return [results[rank] for rank in range(size)]
