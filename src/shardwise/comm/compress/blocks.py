"""Blocks of 256 numbers as int8 and one scale: 8.125 bits a number instead of 32.

    x ─ blocks ─► scale = max |x| / 127 (float32)      q = round(x / scale) (int8)      x ≈ q · scale

(Dettmers et al. 2022, arXiv:2110.02861, with a linear code.) Bytes of all q, then of all scales. What is not finite
makes its block so. Knows tensors; refuses to know who sends them.
"""

from __future__ import annotations

import torch

__all__ = ["BLOCK", "decoded", "encode", "num_bytes_of"]

BLOCK = 256
_SCALE_BYTES = 4
_LARGEST = 127.0


def num_bytes_of(numel: int) -> int:
    """Of so many encoded numbers."""
    return (numel + BLOCK - 1) // BLOCK * (BLOCK + _SCALE_BYTES)


def encode(values: torch.Tensor, out: torch.Tensor) -> None:
    """`values` (rows, numel), any float dtype -> `out` (rows, num_bytes_of(numel)) of bytes."""
    rows, numel = values.shape
    num_blocks = (numel + BLOCK - 1) // BLOCK
    padded = torch.zeros(rows, num_blocks * BLOCK, dtype=torch.float32, device=values.device)
    padded[:, :numel] = values
    blocks = padded.view(rows, num_blocks, BLOCK)
    scales = blocks.abs().amax(-1) / _LARGEST  # (rows, blocks)
    factors = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    codes = blocks.mul_(factors.unsqueeze(-1)).round_().nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    out[:, : num_blocks * BLOCK] = codes.view(rows, -1).view(torch.uint8)
    out[:, num_blocks * BLOCK :] = scales.view(torch.uint8)


def decoded(encoded: torch.Tensor, numel: int) -> torch.Tensor:
    """(rows, bytes) -> (rows, numel) in float32."""
    rows = encoded.shape[0]
    num_blocks = (numel + BLOCK - 1) // BLOCK
    codes = encoded[:, : num_blocks * BLOCK].contiguous().view(torch.int8).view(rows, num_blocks, BLOCK)
    scales = encoded[:, num_blocks * BLOCK :].contiguous().view(torch.float32)
    return (codes * scales.unsqueeze(-1)).view(rows, -1)[:, :numel]
