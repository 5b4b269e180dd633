"""The ranks of a unit as processes: sums over a process group of torch.distributed. Knows nothing of units."""

from __future__ import annotations

import torch
import torch.distributed as dist

from shardwise.comm.point_to_point import Waitable

__all__ = ["ProcessTensorGroup"]


class ProcessTensorGroup:
    """A `TensorGroup` over a process group of which this process is a member. Counts the bytes that it reduces."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = group.rank()
        self._size = group.size()
        self.reduced_bytes = 0
        self.gathered_bytes = 0  # of the whole tensors: half an all-reduce of as many
        self.scattered_bytes = 0
        self.sent_bytes = 0  # from rank to rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        self.reduced_bytes += tensor.numel() * tensor.element_size()
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest elements, in place."""
        self.reduced_bytes += tensor.numel() * tensor.element_size()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors in order."""
        out = torch.empty((self._size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self.gathered_bytes += out.nbytes
        dist.all_gather(list(out.unbind()), tensor, group=self._group)
        return out

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' blocks for this one."""
        out = torch.empty_like(tensor[0])
        self.scattered_bytes += tensor.nbytes
        dist.reduce_scatter(out, list(tensor.unbind()), group=self._group)
        return out

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Send a contiguous tensor to one rank of the group."""
        self.sent_bytes += tensor.nbytes
        work = dist.isend(tensor, group=self._group, group_dst=peer)
        assert work is not None
        return work

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Have the next tensor of one rank of the group put into this one."""
        work = dist.irecv(tensor, group=self._group, group_src=peer)
        assert work is not None
        return work
