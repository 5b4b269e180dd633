"""The memory behind a bucket's parameters: whole all the time, made whole by a gather, or one for all ranks of a host.

    Kept      flat of every rank                       own part written, then gathered
    Freed     flat without storage, own part apart     gathered for a turn
    Common    one flat that all ranks map              own part written; the others read it where it is

Knows a flat tensor and a group; refuses to know parameters.
"""

from __future__ import annotations

from typing import Protocol

import torch

from shardwise.comm.collective import Collective
from shardwise.comm.pages import drop_pages, map_pages
from shardwise.comm.point_to_point import Waitable
from shardwise.comm.shared_collective import SharedMemoryCollective

__all__ = ["Memory", "memory_for"]


class Memory(Protocol):
    """`flat` (numel) is the parameters' memory, of which `part` is this rank's; see `Bucket` for what is done to it."""

    flat: torch.Tensor
    part: slice
    is_common: bool  # what one rank writes, all see

    def at_rest(self) -> torch.Tensor:
        """Once `flat` has its values: the part of this rank, to be updated in place."""
        ...

    def gather(self, own: torch.Tensor) -> Waitable | None:
        """Make `flat` whole from every rank's `own` part, which is cast to its dtype."""
        ...

    def free(self) -> None: ...

    def refresh(self, own: torch.Tensor) -> Waitable | None:
        """`own` parts have new values."""
        ...


def memory_for(numel: int, *, like: torch.Tensor, group: Collective, frees: bool) -> Memory:
    """Of `numel` elements of the dtype and device of `like`. Collective."""
    if isinstance(group, SharedMemoryCollective):
        common = group.common(numel, like.dtype)
        if common is not None:
            return _Common(common, group, frees=frees)
    flat = like.new_zeros(numel)
    return _Freed(flat, group) if frees else _Kept(flat, group)


def _part(numel: int, group: Collective) -> slice:
    part = numel // group.size
    return slice(group.rank * part, (group.rank + 1) * part)


class _Kept:
    is_common = False

    def __init__(self, flat: torch.Tensor, group: Collective) -> None:
        self.flat = flat
        self.part = _part(flat.numel(), group)
        self._group = group

    def at_rest(self) -> torch.Tensor:
        return self.flat[self.part]

    def gather(self, own: torch.Tensor) -> Waitable | None:
        return None

    def free(self) -> None:
        """It stays whole."""

    def refresh(self, own: torch.Tensor) -> Waitable | None:
        here = self.flat[self.part]
        if here.data_ptr() != own.data_ptr():
            here.copy_(own)
        return self._group.all_gather(here, self.flat)


class _Freed:
    is_common = False

    def __init__(self, flat: torch.Tensor, group: Collective) -> None:
        self.flat = flat
        self.part = _part(flat.numel(), group)
        self._group = group
        self._num_bytes = flat.untyped_storage().nbytes()

    def at_rest(self) -> torch.Tensor:
        return self.flat[self.part].clone()

    def gather(self, own: torch.Tensor) -> Waitable | None:
        self.flat.untyped_storage().resize_(self._num_bytes)
        here = self.flat[self.part]
        here.copy_(own)
        return self._group.all_gather(here, self.flat)

    def free(self) -> None:
        self.flat.untyped_storage().resize_(0)

    def refresh(self, own: torch.Tensor) -> Waitable | None:
        return None


class _Common:
    is_common = True

    def __init__(self, flat: torch.Tensor, group: Collective, *, frees: bool) -> None:
        self.flat = flat
        self.part = _part(flat.numel(), group)
        self._frees = frees

    def at_rest(self) -> torch.Tensor:
        return self.flat[self.part]

    def gather(self, own: torch.Tensor) -> Waitable | None:
        if self._frees:
            map_pages(self.flat)
        return None

    def free(self) -> None:
        """The pages of others: the own part is written soon."""
        if self._frees:
            drop_pages(self.flat[: self.part.start])
            drop_pages(self.flat[self.part.stop :])

    def refresh(self, own: torch.Tensor) -> Waitable | None:
        here = self.flat[self.part]
        if here.data_ptr() != own.data_ptr():
            here.copy_(own)
        return None
