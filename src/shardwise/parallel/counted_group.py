"""A group of ranks of which one is here: it answers with tensors of the right shape, and notes what would be exchanged.

For runs on tensors without values. Knows what a `TensorGroup` and the `Links` of a context axis are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from shardwise.describe.kernels import ExchangeKind

__all__ = ["CountedGroup", "Note"]

Note = Callable[[ExchangeKind, str, int, bool], None]  # (kind, axis, bytes, whether compute goes on meanwhile)


@dataclasses.dataclass(frozen=True, slots=True)
class _Done:
    def wait(self) -> None:
        pass


class CountedGroup:
    """Rank `rank` of `size` on `axis`. `hidden`: whether what is sent from rank to rank travels beside compute.

    Where it does not, messages to all the others are one all-to-all.
    """

    def __init__(self, axis: str, note: Note, *, size: int, rank: int = 0, hidden: bool = False) -> None:
        self._axis = axis
        self._note = note
        self._size = size
        self._rank = rank
        self._hidden = hidden
        self._leaving: list[int] = []  # bytes of messages to some of the others

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """As many bytes as it is given."""
        self._note(ExchangeKind.ALL_REDUCE, self._axis, tensor.nbytes, False)
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """As a sum."""
        return self.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(ranks, *shape)."""
        out = tensor.new_empty((self._size, *tensor.shape))
        self._note(ExchangeKind.ALL_GATHER, self._axis, out.nbytes, False)
        return out

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """(ranks, *shape) -> shape."""
        self._note(ExchangeKind.REDUCE_SCATTER, self._axis, tensor.nbytes, False)
        return torch.empty_like(tensor[0])

    def isend(self, tensor: torch.Tensor, peer: int) -> _Done:
        """Noted at once where it is hidden, else with the messages to the other ranks."""
        if self._hidden:
            self._note(ExchangeKind.SEND, self._axis, tensor.nbytes, True)
            return _Done()
        self._leaving.append(tensor.nbytes)
        if len(self._leaving) == self._size - 1:
            self._note(ExchangeKind.ALL_TO_ALL, self._axis, sum(self._leaving), False)
            self._leaving.clear()
        return _Done()

    def irecv(self, tensor: torch.Tensor, peer: int) -> _Done:
        """Leaves the tensor as it is."""
        return _Done()
