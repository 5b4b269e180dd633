"""What of the memory is alive at every moment of a forward and backward on fake tensors, beside what is kept.

    forward of a node     most alive in it − kept when it ends
    backward of a node    most alive in it − kept when it begins            gradients of parameters are not counted

A storage is alive from the operation that makes it until the last tensor that shows it is gone: as on a device, but
for what its allocator rounds. Knows storages and nodes; no units.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch

from shardwise.trace.count import Counter

__all__ = ["LiveCounter"]


class LiveCounter(Counter):
    """A `Counter` that lets storages go. Ask for `saved_bytes` before the backward, which frees what is saved."""

    def __init__(self, *, samples: int | None = None) -> None:
        super().__init__(samples=samples)
        self.alive_bytes = 0
        self.kept_bytes = 0
        self._sizes: dict[int, int] = {}  # storages that are counted
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._most: dict[tuple[int, bool], int] = {}  # (node, backward?) -> most alive
        self._kept_at: dict[tuple[int, bool], int] = {}  # kept when its forward ended, its backward began

    def transient_bytes(self, node: int) -> tuple[int, int]:
        """Forward and backward of a node: the most that is alive besides what is kept then."""
        forward, backward = (
            (self._most.get(key, 0), self._kept_at.get(key, 0)) for key in ((node, False), (node, True))
        )
        return max(0, forward[0] - forward[1]), max(0, backward[0] - backward[1])

    def ends(self, node: int) -> None:
        """The forward of a node is over."""
        self._kept_at[node, False] = self.kept_bytes

    def watch_buffers(self, is_buffer: Callable[[torch.Tensor], bool]) -> None:
        """Which tensors are buffers of the model."""
        self._book.is_buffer = is_buffer

    def is_kept(self, key: int) -> bool:
        """Whether a storage is saved by now."""
        return key in self._saved

    def saved_keys(self) -> Set[int]:
        """Storages that are saved by now."""
        return frozenset(self._saved)

    def saved_by(self, node: int) -> int:
        """Bytes saved by now of what a node has made."""
        return sum(nbytes for key, nbytes in self._saved.items() if self._makers.get(key) == node)

    def maker(self, key: int) -> int | None:
        """The node that made a storage."""
        return self._makers.get(key)

    def size(self, key: int) -> int:
        """Bytes of a storage."""
        return self._sizes.get(key, 0)

    def note(self, node: int, *, backward: bool) -> None:
        """Something was done for a node."""
        key = node, backward
        if backward and key not in self._kept_at:
            self._kept_at[key] = self.kept_bytes
        if self.alive_bytes > self._most.get(key, 0):
            self._most[key] = self.alive_bytes

    def backward(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        found = self.owner()
        if found is not None:
            self.note(found[0], backward=True)
        super().backward(func, args, kwargs, out)
        if found is not None:
            self.note(found[0], backward=True)

    def keep(self, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        key = tensor.untyped_storage()._cdata
        if key not in self._saved:
            self.kept_bytes += self._sizes.get(key, 0)
        super().keep(tensor)

    def claim(self, node: int) -> None:
        """The autograd node that was made last is of a node's forward."""
        self._own_numbers(node)

    def adopt(self, tensor: torch.Tensor, node: int) -> None:
        """A tensor that no operation made: it stands for what a node makes."""
        self._made(tensor, tensor.untyped_storage()._cdata, node)
        self.note(node, backward=False)

    def _hold(self, key: int, storage: torch.UntypedStorage, *, given: bool) -> None:
        if given:
            super()._hold(key, storage, given=True)
            return
        self._sizes[key] = storage.nbytes()
        self.alive_bytes += storage.nbytes()
        self._watched[key] = weakref.ref(storage, functools.partial(self._let_go, key))

    def _let_go(self, key: int, reference: object) -> None:
        del self._watched[key]
        del self._makers[key]
        size = self._sizes.pop(key)
        self.alive_bytes -= size
        if key in self._saved:
            self.kept_bytes -= size
            del self._saved[key]
        self._book.forget(key)
        self._trained.discard(key)
        self._weights.discard(key)
        self._operands.pop(key, None)
