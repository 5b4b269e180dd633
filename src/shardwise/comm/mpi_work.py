"""Operations of MPI under way, as torch.distributed waits for them, and what is left to do when they are done.

Knows tensors of the host's memory and requests; refuses to know which operation it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from shardwise.comm.mpi_world import UnderWay
from shardwise.errors import TransferError

__all__ = ["Begun", "MpiWork", "back", "combine", "dense_of", "fits", "into", "mean_of", "starts"]


class Waits(Protocol):
    """A group: until one of its requests is done."""

    def wait_for(self, each: UnderWay, what: str, timeout_s: float) -> None: ...


class MpiWork(dist.Work):
    """An operation under way. Waiting twice is waiting once."""

    def __init__(
        self, group: Waits, what: str, under_way: Sequence[UnderWay], finish: Callable[[], None] | None
    ) -> None:
        super().__init__()
        self._group = group
        self._what = what
        self._under_way = under_way
        self._finish = finish

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until it is done. RuntimeError where a rank takes longer than the group's timeout."""
        for each in self._under_way:
            self._group.wait_for(each, self._what, timeout.total_seconds())
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would not wait."""
        return all(each.done for each in self._under_way)

    def is_success(self) -> bool:
        """The same: an error is raised by `wait`."""
        return self.is_completed()

    def source_rank(self) -> int:
        """Of a receive that is done: who has sent it."""
        return int(self._under_way[0].status.Get_source())

    _source_rank = source_rank


class Begun:
    """A request, and what is left to do when it is done."""

    __slots__ = ("finish", "under_way")

    def __init__(self, under_way: UnderWay, finish: Callable[[], None] | None) -> None:
        self.under_way = under_way
        self.finish = finish


def dense_of(tensor: torch.Tensor, *, copy: bool = True) -> torch.Tensor:
    """Itself, or one without gaps, with its values if it is to be read."""
    if tensor.is_contiguous():
        return tensor.detach()
    return tensor.detach().contiguous() if copy else torch.empty(tensor.shape, dtype=tensor.dtype)


def into(tensor: torch.Tensor, dense: torch.Tensor) -> None:
    if tensor.data_ptr() != dense.data_ptr():
        tensor.detach().copy_(dense)


def back(tensor: torch.Tensor, dense: torch.Tensor) -> Callable[[], None] | None:
    return None if tensor.data_ptr() == dense.data_ptr() else lambda: into(tensor, dense)


def mean_of(total: torch.Tensor, name: str, ranks: int) -> None:
    if name == "mean":
        if not total.is_floating_point():
            raise TransferError(f"a mean is of floats, but got {total.dtype}; sum, and divide yourself")
        total.div_(ranks)


def combine(name: str, total: torch.Tensor, part: torch.Tensor) -> None:
    if name in ("sum", "mean"):
        total.add_(part)
    elif name == "product":
        total.mul_(part)
    elif name in ("minimum", "maximum"):
        (torch.minimum if name == "minimum" else torch.maximum)(total, part, out=total)
    else:
        {"and": total.bitwise_and_, "or": total.bitwise_or_, "xor": total.bitwise_xor_}[name](part)


def starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:place]) for place in range(len(counts))]


def fits(what: str, needed: int, given: int) -> None:
    if needed != given:
        raise TransferError(f"{what}: the sizes of all ranks make {needed} elements, but the tensor has {given}")
