"""What forwards keep for their backwards, put away until then.

    unit by unit        forward u0 → away   forward u1 → away   …   backward u1 ← back (and u0 on its way) …
    as a schedule says  0F0 0O0 …           O: what stage 0 keeps of micro-batch 0 goes   0L0 0B0   L: it comes back

Autograd's saved tensors, each once however often it is saved; parameters and small tensors stay. Where units are
computed again, what they keep is put away, and what they compute again is not. Knows what is saved; refuses to know
devices, and when a schedule moves what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

from shardwise.execute.around import Body
from shardwise.execute.host_memory import Away, HostMemory

__all__ = ["LEAST_BYTES", "OffloadUnits", "Offloads", "Shelf"]

LEAST_BYTES = 4096  # below, moving costs more than it frees


class _Saved:
    """A tensor that autograd has saved, here or away."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.here: torch.Tensor | None = tensor
        self.away: Away | None = None

    def take(self) -> torch.Tensor:
        if self.here is None:
            assert self.away is not None
            self.here, self.away = self.away.tensor(), None
        return self.here


class Shelf:
    """What one forward keeps, of one unit call or of one stage and micro-batch."""

    def __init__(self, weights: Callable[[], frozenset[int]], *, least_bytes: int = LEAST_BYTES) -> None:
        self._weights = weights
        self._least_bytes = least_bytes
        self._saved: list[_Saved] = []
        self._known: dict[tuple[Any, ...], _Saved] = {}
        self.on_use: Callable[[], None] | None = None  # asked once, when the backward begins

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Around the forward."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def put(self, memory: HostMemory) -> None:
        """Everything goes, once the forward is done."""
        self._known.clear()
        for saved in self._saved:
            if saved.here is not None:
                saved.away, saved.here = memory.put(saved.here), None

    def bring(self) -> None:
        """Everything that is away begins to come back."""
        for saved in self._saved:
            if saved.away is not None:
                saved.away.bring()

    def _pack(self, tensor: torch.Tensor) -> object:
        if not self._moves(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        saved = self._known.get(key)
        if saved is None:
            saved = self._known[key] = _Saved(tensor)
            self._saved.append(saved)
        return saved

    def _unpack(self, packed: object) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        assert isinstance(packed, _Saved)
        if self.on_use is not None:
            used, self.on_use = self.on_use, None
            used()
        self._saved.clear()  # the graph holds what is left
        return packed.take()

    def _moves(self, tensor: torch.Tensor) -> bool:
        return (
            type(tensor) is torch.Tensor
            and tensor.layout is torch.strided
            and self._least_bytes <= tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
            and tensor.untyped_storage()._cdata not in self._weights()
        )


class Weights:
    """Where a module's parameters and buffers lie: storages that stay the same, also where their memory comes and
    goes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: frozenset[int] | None = None

    def __call__(self) -> frozenset[int]:
        if self._known is None:
            held = [*self._module.parameters(), *self._module.buffers()]
            self._known = frozenset(each.untyped_storage()._cdata for each in held)
        return self._known


class OffloadUnits:
    """A wrapper of units (`execute.around`): what a call keeps goes as soon as it is done, and comes back when its
    backward begins, or when that of the call behind it does."""

    def __init__(self, model: nn.Module, memory: HostMemory) -> None:
        self._weights = Weights(model)
        self._memory = memory
        self._last: Shelf | None = None

    def __call__(self, unit: str, body: Body) -> Body:
        """`body`, whose saved tensors are put away."""

        def offloaded(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return body(*args, **kwargs)
            shelf = Shelf(self._weights)
            before, self._last = self._last, shelf
            shelf.on_use = lambda: self._used(shelf, before)
            with shelf.keeping():
                out = body(*args, **kwargs)
            shelf.put(self._memory)
            return out

        return offloaded

    def _used(self, shelf: Shelf, before: Shelf | None) -> None:
        if self._last is shelf:
            self._last = None  # the next forward follows none of these
        shelf.bring()
        if before is not None:
            before.bring()


class Offloads:
    """What stages keep of micro-batches, moved when a schedule says so. `memory` is made when it first does."""

    def __init__(self, model: nn.Module, memory: Callable[[], HostMemory]) -> None:
        self._weights = Weights(model)
        self._make = memory
        self._memory: HostMemory | None = None
        self._shelves: dict[int, Shelf] = {}

    def keeping(self, forward: int) -> contextlib.AbstractContextManager[None]:
        """Around a forward, by the number that its actions share."""
        shelf = self._shelves[forward] = Shelf(self._weights)
        return shelf.keeping()

    def put(self, forward: int) -> None:
        """O: what it keeps goes. (Of a forward that is run again only inputs are kept: they stay.)"""
        if self._memory is None:
            self._memory = self._make()
        if forward in self._shelves:
            self._shelves[forward].put(self._memory)

    def bring(self, forward: int) -> None:
        """L: it comes back."""
        if forward in self._shelves:
            self._shelves.pop(forward).bring()

    def close(self) -> None:
        """Give the host's memory back."""
        if self._memory is not None:
            self._memory.close()
