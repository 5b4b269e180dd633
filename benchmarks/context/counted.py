"""Bytes of tensors, counted and not sampled: what is saved for backward, and the most that is alive. No models."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "SavedBytes", "saved_bytes"]


@dataclass
class SavedBytes:
    """Storages that autograd has saved, each counted once; without those that were there before."""

    total: int = 0
    before: set[int] = field(default_factory=set)
    seen: dict[int, torch.UntypedStorage] = field(default_factory=dict)  # kept: an address is used again


@contextmanager
def saved_bytes(before: Iterable[torch.Tensor]) -> Iterator[SavedBytes]:
    """Counts what functions inside save for their backward, but for the storages of `before`."""
    counted = SavedBytes(before={tensor.untyped_storage().data_ptr() for tensor in before})

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in counted.before and address not in counted.seen:
            counted.seen[address] = storage
            counted.total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, storages that operations make are counted until they are gone: `now`, and `peak`.

    Not what a kernel needs for itself, nor what messages between processes lie in.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}
        for tensor in before:
            self._known[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":  # asked for a shape
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known or not nbytes:
            return
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self.now -= nbytes
        self._known.pop(key, None)
