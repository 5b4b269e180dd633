"""Sums, scattered sums and gathers of flat tensors over a group of ranks. One Protocol, whatever moves the bytes.

    all_reduce        flat  ─ sum over the ranks ─►  flat on every rank
    reduce_scatter    flat  ─ sum over the ranks ─►  out: part `rank` of the sum          flat = part 0 │ part 1 │ …
    all_gather        own   ─ side by side ───────►  flat on every rank
    all_to_all        flat  ─ part i to rank i ───►  out: what each rank has sent to this one, side by side

A flat tensor is dense, of one dim, and, where it has parts, its length a multiple of `size`. Calls stand in the same
order on all ranks of a group. What is handed over stays untouched, and what is received unread, until `wait()`, which
is called once. Sums are made in the order of the ranks or have the same bits on all of them anyway. Knows groups;
refuses to know parameters.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

from shardwise.comm.point_to_point import Waitable

__all__ = [
    "ALL_GATHER",
    "ALL_REDUCE",
    "ALL_TO_ALL",
    "KINDS",
    "REDUCE_SCATTER",
    "All",
    "Collective",
    "Done",
    "ProcessGroupCollective",
    "moved_bytes",
]

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL = "all_reduce", "reduce_scatter", "all_gather", "all_to_all"
KINDS = (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL)


class Collective(Protocol):
    """What a group of ranks does together. RuntimeError if a rank is gone, from the call or from `wait()`."""

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        ...

    @property
    def size(self) -> int: ...

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """By kind, so far: of the whole tensors, of which a rank has or gets a part in a scatter or gather. Bytes as
        they travel; `moved_bytes` says how many of them leave a rank."""
        ...

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """The sum, in place."""
        ...

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """This rank's part of the sum, into `out`, which may be that part of `flat`. The rest of `flat` is undefined
        afterwards."""
        ...

    def all_gather(self, own: torch.Tensor, flat: torch.Tensor) -> Waitable:
        """The ranks' tensors, side by side. `own` may be this rank's part of `flat`."""
        ...

    def all_to_all(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """Part i of `flat` goes to rank i; `out`, as long and apart from it, is made of theirs."""
        ...

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor without values, in memory that this group moves fastest."""
        ...


def moved_bytes(sent_bytes: Mapping[str, int], size: int) -> int:
    """Bytes that leave each of `size` ranks, by the cheapest algorithm: 2 (n - 1) / n of a sum, half that of the others
    (Patarasuk and Yuan 2009)."""
    halves = sum((2 if kind == ALL_REDUCE else 1) * sent_bytes.get(kind, 0) for kind in KINDS)
    return halves * (size - 1) // size


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """What is not under way any more."""

    def wait(self) -> None:
        """Nothing is waited for."""


class ProcessGroupCollective:
    """By torch.distributed. On gloo a scattered sum is an exchange of parts, added here: its own takes twice as long as
    a whole sum, the exchange less than one; a gather is sends and receives of every pair, which take two thirds of its
    own (measured on two and four ranks, 1 to 16 MiB)."""

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device | str = "cpu") -> None:
        self._group: Final = group
        self._device = torch.device(device)
        self._exchanges = dist.get_backend(group) == "gloo"
        self._sent: collections.Counter[str] = collections.Counter()

    @property
    def rank(self) -> int:
        return self._group.rank()

    @property
    def size(self) -> int:
        return int(self._group.size())

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        return self._sent

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_REDUCE] += flat.nbytes
        work: Waitable | None = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        return work

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[REDUCE_SCATTER] += flat.nbytes
        if not self._exchanges:
            scattered: Waitable = self._group._reduce_scatter_base(out, flat, ReduceScatterOptions())
            return scattered
        got = torch.empty_like(flat)
        work = dist.all_to_all_single(got, flat, group=self._group, async_op=True)
        assert work is not None
        return _ToAdd(work, got.view(self.size, -1), out)

    def all_gather(self, own: torch.Tensor, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_GATHER] += flat.nbytes
        if not self._exchanges:
            gathered: Waitable = self._group._allgather_base(flat, own, AllgatherOptions())
            return gathered
        parts = flat.view(self.size, -1)
        if parts[self.rank].data_ptr() != own.data_ptr():
            parts[self.rank].copy_(own)
        others = [(self.rank + shift) % self.size for shift in range(1, self.size)]
        works = [dist.irecv(parts[i], group=self._group, group_src=i) for i in others]
        works += [dist.isend(parts[self.rank], group=self._group, group_dst=i) for i in others]
        return All([work for work in works if work is not None])

    def all_to_all(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_TO_ALL] += flat.nbytes
        work: Waitable | None = dist.all_to_all_single(out, flat, group=self._group, async_op=True)
        assert work is not None
        return work

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Collective`."""
        return torch.empty(numel, dtype=dtype, device=self._device)


@dataclasses.dataclass(frozen=True, slots=True)
class All:
    """Several that are under way."""

    works: Sequence[Waitable]

    def wait(self) -> None:
        """For each, in order."""
        for work in self.works:
            work.wait()


@dataclasses.dataclass(frozen=True, slots=True)
class _ToAdd:
    """Parts of every rank that are on their way to here, (ranks, numel)."""

    work: Waitable
    parts: torch.Tensor
    out: torch.Tensor

    def wait(self) -> None:
        self.work.wait()
        if len(self.parts) == 1:
            self.out.copy_(self.parts[0])
            return
        torch.add(self.parts[0], self.parts[1], out=self.out)
        for part in self.parts[2:]:
            self.out.add_(part)
