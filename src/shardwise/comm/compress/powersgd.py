"""Sums of low rank: a matrix M travels as P (n, r) and Q (m, r), of which it is approximately P Qᵀ.

    P = Σ M Q ─ orthonormal columns ─► Q = Σ Mᵀ P ──► P Qᵀ        Σ: a sum over the ranks; Q is that of the step before

PowerSGD (Vogels et al. 2019, arXiv:1905.13727, algorithms 1 and 2): one step of subspace iteration, started where the
last one ended; what P Qᵀ leaves out is added to the next M. Tensors of one dim, and those that would not get smaller,
travel whole. Every rank makes P Qᵀ of the same numbers in the same way. Knows shapes; refuses to know parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from shardwise.comm.collective import Collective
from shardwise.comm.compress.lossy import Lossy, is_finite
from shardwise.comm.point_to_point import Waitable

__all__ = ["PowerSGD"]

_SEED = 20191201


class PowerSGD(Lossy):
    """Of sums; a scattered sum is part of one. `shapes` are those of the tensors in the flat one, in their order; what
    is behind them travels whole."""

    def __init__(self, inner: Collective, shapes: Sequence[Sequence[int]], rank: int) -> None:
        super().__init__(inner)
        self._matrices: list[tuple[int, int, int, int]] = []  # start, rows, columns, rank
        self._whole: list[slice] = []
        start = 0
        for shape in shapes:
            numel = math.prod(shape)
            rows, columns = (shape[0], numel // shape[0]) if len(shape) > 1 and numel else (1, numel)
            own = min(rank, rows, columns)
            if own * (rows + columns) < numel:
                self._matrices.append((start, rows, columns, own))
            else:
                self._whole.append(slice(start, start + numel))
            start += numel
        self._whole.append(slice(start, None))
        self._q: list[torch.Tensor] = []
        self._q_numel = sum(columns * own for _, _, columns, own in self._matrices)
        self._second: torch.Tensor | None = None

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        if not self._matrices:
            return self._inner.all_reduce(flat)
        self._start_q(flat.device)
        matrices = sum(rows * columns for _, rows, columns, _ in self._matrices)
        of_p = sum(rows * own for _, rows, _, own in self._matrices)
        first = self._wire("p", of_p + flat.numel() - matrices, torch.float32)
        left = self._with_left(flat)
        for whole in self._whole:
            left[whole] = 0.0  # it goes as it is
        p = [_matrix(left, where) @ q for where, q in zip(self._matrices, self._q, strict=True)]
        _put([*p, *(flat[whole] for whole in self._whole)], first)
        self.saved_bytes += flat.nbytes - first.nbytes - self._q_numel * first.element_size()
        return self._begun(self._inner.all_reduce(first), lambda: self._finish(first, flat, left))

    def _finish(self, first: torch.Tensor, flat: torch.Tensor, left: torch.Tensor) -> None:
        p, at = [], 0
        for _, rows, _, own in self._matrices:
            p.append(_orthonormal(first[at : at + rows * own].view(rows, own)))
            at += rows * own
        local = [_matrix(left, where).t() @ each for where, each in zip(self._matrices, p, strict=True)]
        if self._second is None:
            self._second = self._inner.empty(self._q_numel, torch.float32)
        second = self._second
        _put(local, second)
        self._inner.all_reduce(second).wait()
        for whole in self._whole:
            numel = flat[whole].numel()
            flat[whole] = first[at : at + numel]
            at += numel
        at = 0
        for place, (where, each) in enumerate(zip(self._matrices, p, strict=True)):
            start, rows, columns, own = where
            q = second[at : at + columns * own].view(columns, own).clone()  # aligned alike on all ranks
            at += columns * own
            total = (each @ q.t()).view(-1)
            flat[start : start + rows * columns] = total
            left[start : start + rows * columns].sub_(total, alpha=1 / self.size)
            self._q[place] = q
        if not is_finite(second):
            left.zero_()
            self._q.clear()

    def _start_q(self, device: torch.device) -> None:
        if not self._q:
            generator = torch.Generator().manual_seed(_SEED)
            self._q = [
                torch.randn(columns, own, generator=generator).to(device) for _, _, columns, own in self._matrices
            ]


def _matrix(flat: torch.Tensor, where: tuple[int, int, int, int]) -> torch.Tensor:
    start, rows, columns, _ = where
    return flat[start : start + rows * columns].view(rows, columns)


def _put(tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    """Side by side."""
    at = 0
    for each in tensors:
        flat[at : at + each.numel()] = each.reshape(-1)
        at += each.numel()


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Columns that span the same, of memory of their own: aligned alike, they have the same bits on all ranks."""
    own = columns.clone()
    if not is_finite(own):
        return torch.full_like(own, float("nan"))
    q: torch.Tensor = torch.linalg.qr(own).Q
    return q.contiguous()
