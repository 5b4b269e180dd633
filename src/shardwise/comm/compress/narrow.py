"""Sums in 16 bits: tensors are rounded before they travel, and what comes back is made wide again.

bfloat16 has float32's range and 8 bits of precision, float16 11 bits and overflows above 65504. Nothing is kept of what
rounding leaves out: it has no direction.
"""

from __future__ import annotations

import torch

from shardwise.comm.collective import Collective
from shardwise.comm.compress.lossy import Lossy
from shardwise.comm.point_to_point import Waitable

__all__ = ["Narrow"]


class Narrow(Lossy):
    """Of sums and scattered sums; `dtype` is torch.bfloat16 or torch.float16."""

    def __init__(self, inner: Collective, dtype: torch.dtype) -> None:
        super().__init__(inner)
        self._dtype = dtype

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        wire = self._narrowed(flat)
        return self._begun(self._inner.all_reduce(wire), lambda: _widen(wire, flat))

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        wire = self._narrowed(flat)
        own = wire[self.rank * out.numel() : (self.rank + 1) * out.numel()]
        return self._begun(self._inner.reduce_scatter(wire, own), lambda: _widen(own, out))

    def _narrowed(self, flat: torch.Tensor) -> torch.Tensor:
        self.saved_bytes += flat.nbytes - flat.numel() * self._dtype.itemsize
        return self._wire("narrow", flat.numel(), self._dtype).copy_(flat)


def _widen(wire: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(wire)
