"""Collectives with ranks outside the default process group: the counterparts of a rank in other worlds.

    reduce-scatter   every pair exchanges parts, each rank adds its own in the order of ranks
    all-gather       the sums go to everyone                                an all-reduce: both, one behind the other

Each element is added in the order of the ranks, wherever it stands in a tensor: two ranks that hold the same weights
and sum them with their own counterparts get the same bits. Tensors are in the host's memory; bytes travel by gloo.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from shardwise.comm.collective import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER
from shardwise.comm.point_to_point import Waitable

__all__ = ["OutsideCollective"]


class OutsideCollective:
    """A `Collective` over `size` ranks that meet in `store`, each as `rank`. Names of one store differ by use."""

    def __init__(self, store: Store, name: str, *, rank: int, size: int, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        self._gloo: Any = dist.ProcessGroupGloo(
            PrefixStore(name, store), rank, size, timeout
        )  # typed without its calls
        self.rank = rank
        self.size = size
        self._sent: collections.Counter[str] = collections.Counter()

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """See `Collective`."""
        return self._sent

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`. Half of it is done by `wait()`."""
        self._sent[ALL_REDUCE] += flat.nbytes
        rest = -flat.numel() % self.size
        padded = torch.cat([flat, flat.new_zeros(rest)]) if rest else flat
        return _Sum(self, flat, padded, self._exchange(padded))

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[REDUCE_SCATTER] += flat.nbytes
        return dataclasses.replace(self._exchange(flat), out=out)

    def all_gather(self, own: torch.Tensor, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_GATHER] += flat.nbytes
        return self.gather(own, flat)

    def gather(self, own: torch.Tensor, flat: torch.Tensor) -> Waitable:
        """An all-gather that is not counted."""
        parts = list(flat.view(self.size, -1).unbind())
        given = own.clone() if own.data_ptr() == parts[self.rank].data_ptr() else own
        gathered: Waitable = self._gloo.allgather([parts], [given])
        return gathered

    def all_to_all(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_TO_ALL] += flat.nbytes
        return _Kept(self._gloo.alltoall_base(out, flat, [], []), flat)

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Collective`."""
        return torch.empty(numel, dtype=dtype)

    def values(self, own: Any) -> list[Any]:
        """What every rank gave, in their order: values that can be pickled. Collective."""
        packed = torch.frombuffer(bytearray(pickle.dumps(own)), dtype=torch.uint8)
        sizes = torch.empty(self.size, dtype=torch.int64)
        self.gather(torch.tensor([packed.numel()]), sizes).wait()
        length = int(sizes.max())
        padded, flat = torch.zeros(length, dtype=torch.uint8), torch.empty(self.size * length, dtype=torch.uint8)
        padded[: packed.numel()] = packed
        self.gather(padded, flat).wait()
        of_ranks = flat.view(self.size, length)
        return [pickle.loads(bytes(part[:size].numpy())) for part, size in zip(of_ranks, sizes.tolist(), strict=True)]

    def _exchange(self, flat: torch.Tensor) -> _ToAdd:
        got = torch.empty_like(flat)
        work = self._gloo.alltoall_base(got, flat, [], [])
        parts = got.view(self.size, -1)
        return _ToAdd(work=work, parts=parts, out=torch.empty_like(parts[0]), kept=flat)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ToAdd:
    """Parts of every rank on their way to here, (ranks, numel); what was handed over is kept meanwhile."""

    work: Waitable
    parts: torch.Tensor
    out: torch.Tensor
    kept: torch.Tensor

    def wait(self) -> None:
        self.work.wait()
        self.out.copy_(self.parts[0])
        for part in self.parts[1:]:
            self.out.add_(part)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """An all-reduce of which the first half is under way."""

    group: OutsideCollective
    flat: torch.Tensor
    padded: torch.Tensor
    part: _ToAdd

    def wait(self) -> None:
        self.part.wait()
        self.group.gather(self.part.out, self.padded).wait()
        if self.padded is not self.flat:
            self.flat.copy_(self.padded[: self.flat.numel()])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A call under way, and what was handed over."""

    work: Waitable
    kept: torch.Tensor

    def wait(self) -> None:
        self.work.wait()
