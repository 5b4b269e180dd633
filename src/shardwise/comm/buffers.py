"""Where messages are received: memory that is used again once nobody holds what came in it.

    received ─ saved by autograd until the backward ─ a queue of weight gradients until W ─ free
    a step of m micro-batches needs as many as are alive at once, and every step uses the same

What holds a tensor is not for the receiver to know (a graph, a queue, a user's attribute): torch counts who refers to
its memory, and a buffer is free when only this list does. Knows shapes; no ranks, no order of messages.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["ReceiveBuffers"]

_Kind = tuple[tuple[int, ...], torch.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """A buffer; its storage is kept as an object so that nobody makes another one to count by."""

    tensor: torch.Tensor
    storage: torch.UntypedStorage

    @property
    def is_free(self) -> bool:
        return torch._C._storage_Use_Count(self.storage._cdata) == 2  # the two above


class ReceiveBuffers:
    """Buffers by shape and dtype, on the CPU. Of shapes that a step did not use, none are kept behind it."""

    def __init__(self) -> None:
        self._held: dict[_Kind, list[_Held]] = {}
        self._used: set[_Kind] = set()

    @property
    def nbytes(self) -> int:
        """Of all buffers, free or not."""
        return sum(held.tensor.nbytes for kind in self._held.values() for held in kind)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without values. Its memory is given again when neither it nor anything made of it is left."""
        kind = (shape, dtype)
        self._used.add(kind)
        held = self._held.setdefault(kind, [])
        for place, each in enumerate(held):
            if each.is_free:
                if place < len(held) - 1:  # the one that was given longest ago comes first
                    held.append(held.pop(place))
                return each.tensor.detach()
        made = torch.empty(shape, dtype=dtype)
        held.append(_Held(made, made.untyped_storage()))
        return made.detach()

    def end_step(self) -> None:
        """Let go of shapes that were not asked for since the last call."""
        for kind in self._held.keys() - self._used:
            del self._held[kind]
        self._used.clear()
