"""Where tensors come from while a forward is recorded: values, aliases and in-place writes.

A tensor's value is the node that made the tensor object, and every later write into its storage. Tensors without an
origin (the batch, buffers, constants) are free: every process has them.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["Born", "Origin", "Origins"]


@dataclasses.dataclass(frozen=True, slots=True)
class Born:
    """Made inside the unit call of this node and not (yet) seen outside."""

    node: int


Origin = int | Born  # a value index, or a tensor still inside its unit


@dataclasses.dataclass(slots=True)
class _Storage:
    creator: Origin | None
    writers: list[tuple[int, Origin]] = dataclasses.field(default_factory=list)


class Origins:
    """The origins of all tensors of one trace. Keeps every tensor it has seen alive, so that identities stay unique."""

    def __init__(self) -> None:
        self._clock = 0
        self._by_id: dict[int, tuple[int, int]] = {}  # id(tensor) -> (value, time)
        self._storages: dict[int, _Storage] = {}
        self._keep: list[object] = []

    def bear(self, tensor: torch.Tensor, node: int) -> None:
        """A tensor was made inside the unit call `node`; views of older storages change nothing."""
        key = _key(tensor)
        if key is not None and key not in self._storages:
            self._storages[key] = _Storage(Born(node))
            self._keep.append(tensor.untyped_storage())

    def name(self, tensor: torch.Tensor, value: int, *, fresh: bool = True) -> None:
        """`tensor` is from now on the value `value`; not `fresh` if it is a view of something that was there before."""
        self._clock += 1
        self._by_id[id(tensor)] = (value, self._clock)
        self._keep.append(tensor)
        key = _key(tensor)
        if key is None:
            return
        if key not in self._storages:
            self._storages[key] = _Storage(value if fresh else None)
            self._keep.append(tensor.untyped_storage())
        elif isinstance(self._storages[key].creator, Born):
            self._storages[key].creator = value

    def alias(self, tensor: torch.Tensor, base: torch.Tensor) -> None:
        """`tensor` is a view of `base`, made inside a unit: it has the origin of `base`."""
        self._keep.append(tensor)
        if id(base) in self._by_id:
            self._by_id[id(tensor)] = self._by_id[id(base)]

    def write(self, tensor: torch.Tensor, origin: Origin) -> None:
        """The storage of `tensor` was written in place."""
        key = _key(tensor)
        if key is None:
            return
        self._clock += 1
        if key not in self._storages:
            self._storages[key] = _Storage(None)
            self._keep.append(tensor.untyped_storage())
        self._storages[key].writers.append((self._clock, origin))

    def known(self, tensor: torch.Tensor) -> bool:
        """Whether anything has been recorded of the tensor's object or storage."""
        return id(tensor) in self._by_id or _key(tensor) in self._storages

    def value_of(self, tensor: torch.Tensor) -> int | None:
        """The value this very object was named, if any."""
        found = self._by_id.get(id(tensor))
        return None if found is None else found[0]

    def of(self, tensor: torch.Tensor) -> set[Origin]:
        """Everything the tensor's present value depends on."""
        named = self._by_id.get(id(tensor))
        key = _key(tensor)
        storage = self._storages.get(key) if key is not None else None
        origins: set[Origin] = set()
        since = 0
        if named is not None:
            origins.add(named[0])
            since = named[1]
        elif storage is not None and storage.creator is not None:
            origins.add(storage.creator)
        if storage is not None:
            later = [origin for time, origin in storage.writers if time > since]
            if later and named is None:
                origins.clear()
            origins.update(later[-1:])  # the last write reads the ones before it, and what the storage was at first
        return origins

    def written(self) -> dict[int, list[Origin]]:
        """Storage -> writers, of the storages that were written after they were made."""
        return {key: [o for _, o in s.writers] for key, s in self._storages.items() if s.writers}

    def storage(self, tensor: torch.Tensor) -> int | None:
        """A key that aliases share."""
        return _key(tensor)


def _key(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and the like have no storage
        return None
