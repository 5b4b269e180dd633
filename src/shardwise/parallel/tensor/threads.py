"""The ranks of a unit as threads of one process. Knows barriers; the whole of a proof runs on it.

A rank that raises ends the others at once: none waits for what will not come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["ThreadGroup", "on_threads"]

Result = TypeVar("Result")
_DEADLINE_SECONDS = 60.0


class ThreadGroup:
    """A `TensorGroup`: one rank's view of slots that all ranks share."""

    def __init__(self, rank: int, slots: list[torch.Tensor | None], barrier: threading.Barrier) -> None:
        self._rank = rank
        self._slots = slots
        self._barrier = barrier

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

    def _exchanged(self, tensor: torch.Tensor, combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        self._slots[self._rank] = tensor.detach()
        self._barrier.wait(_DEADLINE_SECONDS)
        given = [slot for slot in self._slots if slot is not None]
        if any(slot.shape != tensor.shape for slot in given):
            raise ValueError(f"ranks exchange tensors of one shape, not of {[tuple(s.shape) for s in given]}")
        out = combine(given)
        self._barrier.wait(_DEADLINE_SECONDS)
        return out

    def _combined(
        self, tensor: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        self._slots[self._rank] = tensor.detach()
        self._barrier.wait(_DEADLINE_SECONDS)
        given = [slot for slot in self._slots if slot is not None]
        if any(slot.shape != tensor.shape for slot in given):
            raise ValueError(f"ranks sum tensors of one shape, and these have {[tuple(s.shape) for s in given]}")
        total = given[0].clone()
        for other in given[1:]:
            total = combine(total, other)
        self._barrier.wait(_DEADLINE_SECONDS)  # until all have read, nobody puts the next one into the slots
        return total


def on_threads(size: int, work: Callable[[ThreadGroup], Result]) -> list[Result]:
    """`work(group)` on `size` ranks at once; their results in order. Raises what the first rank to fail raised.

    The ranks share torch's threads: a pool of all cores for each of them would wait for itself.
    """
    num_threads = torch.get_num_threads()
    slots: list[torch.Tensor | None] = [None] * size
    barrier = threading.Barrier(size)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        torch.set_num_threads(max(1, num_threads // size))  # of this thread
        try:
            results[rank] = work(ThreadGroup(rank, slots, barrier))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(num_threads)  # of threads to come
    if errors:
        raise errors[0]
    if len(results) < size:
        raise TimeoutError(f"{size} ranks meet in every sum, and one of them did not come in {_DEADLINE_SECONDS:g} s")
    return [results[rank] for rank in range(size)]
