"""Messages of fewer bytes: float tensors travel as 16 bits, or as int8 blocks, and arrive in their own dtype.

Both sides know it from shape and dtype. Whole numbers, small tensors and headers travel as they are. No error is fed
back: what a stage sends next is of another micro-batch. Knows messages; refuses to know what they are of.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch

from shardwise.comm.compress.blocks import decoded, encode, num_bytes_of
from shardwise.comm.point_to_point import Transport, Waitable

__all__ = ["CompressedTransport"]

_SMALLEST = 1024  # elements; below, nothing is saved


class CompressedTransport:
    """A `Transport` over another one. `dtype` is a float type of 16 bits; None: int8 blocks."""

    def __init__(self, transport: Transport, dtype: torch.dtype | None) -> None:
        self._transport: Final = transport
        self._dtype = dtype
        self.saved_bytes = 0  # of what this rank has sent

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Send; `tensor` may be written at once."""
        if not self._is_compressed(tensor):
            return self._transport.isend(tensor, peer)
        wire = self._wire(tensor)
        if self._dtype is None:
            encode(tensor.reshape(1, -1), wire.view(1, -1))
        else:
            wire.copy_(tensor.reshape(-1))
        self.saved_bytes += tensor.nbytes - wire.nbytes
        return _Sent(self._transport.isend(wire, peer), wire)

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        """Have the next message of `peer` put into a contiguous tensor, in its own dtype."""
        if not self._is_compressed(tensor):
            return self._transport.irecv(tensor, peer)
        wire = self._wire(tensor)
        return _Received(self._transport.irecv(wire, peer), wire, tensor)

    def _is_compressed(self, tensor: torch.Tensor) -> bool:
        wide = tensor.dtype in (torch.float32, torch.float64)
        if self._dtype is None:
            wide = tensor.is_floating_point()
        return wide and tensor.numel() >= _SMALLEST

    def _wire(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._dtype is None:
            return torch.empty(num_bytes_of(tensor.numel()), dtype=torch.uint8, device=tensor.device)
        return torch.empty(tensor.numel(), dtype=self._dtype, device=tensor.device)


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    """A message under way, whose memory is kept."""

    work: Waitable
    wire: torch.Tensor

    def wait(self) -> None:
        self.work.wait()


@dataclasses.dataclass(frozen=True, slots=True)
class _Received:
    """A message under way to its tensor."""

    work: Waitable
    wire: torch.Tensor
    tensor: torch.Tensor

    def wait(self) -> None:
        self.work.wait()
        if self.wire.dtype == torch.uint8:
            self.tensor.view(-1).copy_(decoded(self.wire.view(1, -1), self.tensor.numel()).view(-1))
        else:
            self.tensor.view(-1).copy_(self.wire)
