"""Sums of what is large: every rank sends the numbers of greatest magnitude with their places, and keeps the rest.

    g + e = [ 0.1 -3  0.2  2 ]  ── k = 2 ──►  (-3 at 1), (2 at 3) to all        e = [ 0.1  0  0.2  0 ]

(Lin et al. 2018, arXiv:1712.01887, without its corrections of momentum; Stich et al. 2018, arXiv:1809.07599.) The sum
is made on every rank, in the order of the ranks. Four bytes of value and four of place: at a fraction of 0.01 with two
ranks that is 2 % of a sum, and it grows with the ranks.
"""

from __future__ import annotations

import math

import torch

from shardwise.comm.collective import Collective
from shardwise.comm.compress.lossy import Lossy
from shardwise.comm.point_to_point import Waitable

__all__ = ["TopK"]


class TopK(Lossy):
    """Of sums; a scattered sum is part of one. `fraction` of the numbers travel, one at least."""

    def __init__(self, inner: Collective, fraction: float) -> None:
        super().__init__(inner)
        self._fraction = fraction

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        k = min(flat.numel(), max(1, math.ceil(self._fraction * flat.numel())))
        wire = self._wire("chosen", self.size * 2 * k, torch.int32)
        rows = wire.view(self.size, 2, k)  # values as they are in memory, places
        self.saved_bytes += flat.nbytes - wire.nbytes // 2  # a gather costs half a sum of as many
        left = self._with_left(flat)
        places = left.abs().topk(k, sorted=False).indices
        rows[self.rank, 0] = left[places].view(torch.int32)
        rows[self.rank, 1] = places.to(torch.int32)
        left[places] = 0.0
        self._forget_what_is_not_finite()
        work = self._inner.all_gather(rows[self.rank].view(-1), wire)
        return self._begun(work, lambda: _add_up(rows, flat))


def _add_up(rows: torch.Tensor, flat: torch.Tensor) -> None:
    total = flat.zero_() if flat.dtype == torch.float32 else torch.zeros(flat.numel(), device=flat.device)
    for values, places in rows:
        total.index_add_(0, places, values.contiguous().view(torch.float32))
    if total is not flat:
        flat.copy_(total)
