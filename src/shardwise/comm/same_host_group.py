"""Sums and maxima over ranks of one host, through shared memory. Knows a transport and an order of ranks, no units.

    small   every rank sends all it has to every other, and sums                         one step
    large   rank r sums part r of the tensor, and sends the sum to the others            two steps, 2/n of the adding

Both combine in the order of the ranks, so every rank has the same bits, whichever way is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from shardwise.comm.point_to_point import Transport, Waitable

__all__ = ["SameHostGroup"]

_SMALL_BYTES = 512 << 10
_CHUNK_BYTES = 1 << 20  # what is received into one scratch tensor, which stays in the cache
_AHEAD = 2  # chunks that are sent before the first is received


class Combine(Protocol):
    """torch.add, torch.maximum."""

    def __call__(self, one: torch.Tensor, other: torch.Tensor, /, *, out: torch.Tensor) -> torch.Tensor: ...


class SameHostGroup:
    """Ranks that sum tensors (a `TensorGroup`): each makes one, over a transport that reaches all others.

    Calls stand in the same order on all of `ranks`, among themselves and among other uses of the transport.
    """

    def __init__(self, transport: Transport, ranks: Sequence[int], rank: int) -> None:
        """`ranks` in the order of the sum, `rank` this process's own among them: numbers of the transport."""
        self._transport = transport
        self._ranks = tuple(ranks)
        self._own = self._ranks.index(rank)
        self.reduced_bytes = 0
        self.gathered_bytes = 0  # of the whole tensors: half an all-reduce of as many
        self.scattered_bytes = 0
        self.sent_bytes = 0  # from rank to rank

    @property
    def rank(self) -> int:
        return self._own

    @property
    def size(self) -> int:
        return len(self._ranks)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place. RuntimeError if a rank is gone."""
        return self._reduce(tensor, torch.add)

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest elements, in place; where a rank has NaN, NaN. RuntimeError if a rank is gone."""
        return self._reduce(tensor, torch.maximum)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' dense tensors of one shape, in order. RuntimeError if a rank is gone."""
        out = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self.gathered_bytes += out.nbytes
        out[self._own].copy_(tensor)
        if out.numel():
            self._share([block.view(-1) for block in out])
        return out

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' blocks for this one; `tensor` (ranks, ...) is dense. RuntimeError if a rank is gone."""
        self.scattered_bytes += tensor.nbytes
        own = tensor[self._own].clone()
        if own.numel():
            blocks = [own if i == self._own else tensor[i] for i in range(self.size)]
            self._exchange([block.view(-1) for block in blocks], torch.add)
        return own

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """What the rank at place `source` of the order has, in place; that rank does not wait for the others."""
        if self._own == source:
            works = [self._transport.isend(tensor, rank) for i, rank in enumerate(self._ranks) if i != source]
        else:
            works = [self._transport.irecv(tensor, self._ranks[source])]
        for work in works:
            work.wait()
        return tensor

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Send a contiguous tensor to one rank of the group, by its place in the order."""
        self.sent_bytes += tensor.nbytes
        return self._transport.isend(tensor, self._ranks[peer])

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Have the next tensor of one rank of the group put into this one."""
        return self._transport.irecv(tensor, self._ranks[peer])

    def _reduce(self, tensor: torch.Tensor, combine: Combine) -> torch.Tensor:
        self.reduced_bytes += tensor.nbytes
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        if not tensor.is_contiguous():
            return tensor.copy_(self._reduce_flat(tensor.contiguous(), combine))
        return self._reduce_flat(tensor, combine)

    def _reduce_flat(self, tensor: torch.Tensor, combine: Combine) -> torch.Tensor:
        flat = tensor.view(-1)
        if tensor.nbytes <= _SMALL_BYTES:
            self._exchange([flat] * self.size, combine)
        else:
            part = -(-flat.numel() // self.size)
            parts = [flat[i * part : (i + 1) * part] for i in range(self.size)]
            self._exchange(parts, combine)
            self._share(parts)
        return tensor

    def _exchange(self, parts: Sequence[torch.Tensor], combine: Combine) -> None:
        """Send part i to rank i; this rank's own part becomes the sum of what the ranks have of it."""
        step = _CHUNK_BYTES // parts[0].element_size()
        own = parts[self._own]
        others = [i for i in range(self.size) if i != self._own]
        scratch = {i: torch.empty_like(own[:step]) for i in others}
        sent: list[Waitable] = []
        starts = range(0, parts[0].numel(), step)  # the first part is the longest
        for turn in range(len(starts) + _AHEAD):
            if turn < len(starts):
                start = starts[turn]
                sent += [self._transport.isend(parts[i][start : start + step], self._ranks[i]) for i in others]
            if turn >= _AHEAD:
                start = starts[turn - _AHEAD]
                self._gather(own[start : start + step], scratch, combine)
        for work in sent:
            work.wait()

    def _gather(self, own: torch.Tensor, scratch: dict[int, torch.Tensor], combine: Combine) -> None:
        """Receive every other rank's values for `own` and combine them into it, in the order of the ranks."""
        posted = {}
        for i, buffer in scratch.items():
            posted[i] = self._transport.irecv(buffer[: own.numel()], self._ranks[i])
        for work in posted.values():
            work.wait()
        values = [own if i == self._own else scratch[i][: own.numel()] for i in range(self.size)]
        total = values[0]
        for i in range(1, self.size):
            total = combine(total, values[i], out=own if i >= self._own else total)

    def _share(self, parts: Sequence[torch.Tensor]) -> None:
        """Send this rank's own part to all others and receive theirs."""
        others = [i for i in range(self.size) if i != self._own]
        works = [self._transport.irecv(parts[i], self._ranks[i]) for i in others]
        works += [self._transport.isend(parts[self._own], self._ranks[i]) for i in others]
        for work in works:
            work.wait()
