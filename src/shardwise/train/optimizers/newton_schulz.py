"""The nearest orthogonal matrix, nearly: five steps of a quintic iteration that pulls all singular values towards 1.

    X₀ = G / ‖G‖     A = X Xᵀ     X ← a X + (b A + c A²) X          a, b, c = 3.4445, -4.7750, 2.0315

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". In float32 or float64, where the
original uses bfloat16: a rank's update is one device's to its rounding. Knows matrices; no optimizer.
"""

from __future__ import annotations

import torch

__all__ = ["as_matrices", "orthogonalised"]

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalised(matrices: torch.Tensor, *, steps: int = 5, epsilon: float = 1e-7) -> torch.Tensor:
    """Of (..., rows, columns): singular values between about 0.7 and 1.2, vectors kept."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices if matrices.dtype is torch.float64 else matrices.float()
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(epsilon)
    for _ in range(steps):
        a = x @ x.mT
        x = _A * x + (_B * a + _C * (a @ a)) @ x
    return x.mT if tall else x  # type: ignore[no-any-return]


def as_matrices(whole: torch.Tensor) -> torch.Tensor:
    """(rows, columns) as it is, a stack (experts, rows, columns) as it is, a convolution as (out, all else)."""
    return whole if whole.dim() <= 3 else whole.flatten(1)
