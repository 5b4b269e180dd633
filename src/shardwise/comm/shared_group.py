"""Sums over ranks of one host that map each other's memory, for tensors of any shape that are waited for at once.

What is not a sum or a gather still goes by messages. Knows a collective and a group of messages; no units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.comm.collective import Collective
from shardwise.comm.point_to_point import Transport
from shardwise.comm.same_host_group import SameHostGroup

__all__ = ["SharedGroup"]


class SharedGroup(SameHostGroup):
    """A `SameHostGroup` whose sums and gathers are those of `collective`, which is over the same ranks in the same
    order. Small ones are awaited by looking, not by sleeping: with a core a rank that is less than half the time."""

    def __init__(self, collective: Collective, transport: Transport, ranks: Sequence[int], rank: int) -> None:
        super().__init__(transport, ranks, rank)
        self._collective = collective

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place. RuntimeError if a rank is gone."""
        self.reduced_bytes += tensor.nbytes
        if tensor.is_contiguous():
            self._collective.all_reduce(tensor.view(-1)).wait()
            return tensor
        flat = tensor.contiguous().view(-1)
        self._collective.all_reduce(flat).wait()
        return tensor.copy_(flat.view(tensor.shape))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' dense tensors of one shape, in order. RuntimeError if a rank is gone."""
        out = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self.gathered_bytes += out.nbytes
        self._collective.all_gather(tensor.reshape(-1), out.view(-1)).wait()
        return out

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' blocks for this one; `tensor` (ranks, ...) is dense. RuntimeError if a rank is gone."""
        self.scattered_bytes += tensor.nbytes
        out = torch.empty(tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        self._collective.reduce_scatter(tensor.reshape(-1), out.view(-1)).wait()
        return out
