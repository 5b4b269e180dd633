"""Sums in 8 bits: parts are exchanged as int8 blocks, added in float32, and the sums gathered as int8 blocks.

    g + e ─ encode ─► parts to their ranks ─ add ─► sum + e' ─ encode ─► to all        e: what this rank left of its own
                                                                                       e': what its part's sum lost

Both errors are fed back (DoubleSqueeze: Tang et al. 2019, arXiv:1905.05957). All ranks decode the same bytes.
"""

from __future__ import annotations

import torch

from shardwise.comm.collective import Collective
from shardwise.comm.compress.blocks import decoded, encode, num_bytes_of
from shardwise.comm.compress.lossy import Lossy, is_finite
from shardwise.comm.point_to_point import Waitable

__all__ = ["Int8"]


class Int8(Lossy):
    """Of sums and scattered sums."""

    def __init__(self, inner: Collective) -> None:
        super().__init__(inner)
        self._left_of_sum: torch.Tensor | None = None
        self._whole: torch.Tensor | None = None

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        part = -(-flat.numel() // self.size)
        self.saved_bytes += flat.nbytes - self.size * num_bytes_of(part)
        work, got = self._exchange(flat, part)
        return self._begun(work, lambda: self._share(_sum_of(got, part), flat))

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        part = out.numel()
        self.saved_bytes += flat.nbytes - self.size * num_bytes_of(part)
        work, got = self._exchange(flat, part)
        return self._begun(work, lambda: _copy(_sum_of(got, part), out))

    def left_out(self, numel: int) -> torch.Tensor:
        """See `Lossy`; with what its part of the sums has lost."""
        left = super().left_out(numel)
        if self._left_of_sum is not None:
            part = left[self.rank * self._left_of_sum.numel() :][: self._left_of_sum.numel()]
            part.add_(self._left_of_sum[: part.numel()])
        return left

    def _exchange(self, flat: torch.Tensor, part: int) -> tuple[Waitable, torch.Tensor]:
        """What every rank has of this rank's part is on its way to (ranks, bytes)."""
        wire = self._wire("parts", self.size * num_bytes_of(part), torch.uint8)
        left = self._with_left(flat, self.size * part).view(self.size, part)
        rows = wire.view(self.size, -1)
        encode(left, rows)
        left.sub_(decoded(rows, part))
        self._forget_what_is_not_finite()
        got = torch.empty_like(wire)
        return self._inner.all_to_all(wire, got), got.view(self.size, -1)

    def _share(self, total: torch.Tensor, flat: torch.Tensor) -> None:
        """Sums of parts, each on its rank, become the whole sum on all."""
        part = total.numel()
        if self._left_of_sum is None:
            self._left_of_sum = torch.zeros_like(total)
        left = self._left_of_sum.add_(total)
        if self._whole is None:
            self._whole = self._inner.empty(self.size * num_bytes_of(part), torch.uint8)
        whole = self._whole
        rows = whole.view(self.size, -1)
        own = rows[self.rank : self.rank + 1]
        encode(left.view(1, part), own)
        left.sub_(decoded(own, part).view(-1))
        if not is_finite(left):
            left.nan_to_num_(0.0, 0.0, 0.0)
        self._inner.all_gather(own.view(-1), whole).wait()
        flat.copy_(decoded(rows, part).reshape(-1)[: flat.numel()])


def _sum_of(encoded: torch.Tensor, part: int) -> torch.Tensor:
    """In the order of the ranks."""
    values = decoded(encoded, part)
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)
