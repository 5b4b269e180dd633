"""Blocks of int8 and their scales."""

from __future__ import annotations

import pytest
import torch

from shardwise.comm.compress.blocks import BLOCK, decoded, encode, num_bytes_of


@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_is_wrong_by_half_a_step_of_its_block(numel: int, dtype: torch.dtype) -> None:
    values = (torch.randn(2, numel, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1e6]])).to(
        dtype
    )
    wire = torch.empty(2, num_bytes_of(numel), dtype=torch.uint8)
    encode(values, wire)
    got = decoded(wire, numel)
    for start in range(0, numel, BLOCK):
        block = values[:, start : start + BLOCK].float()
        steps = block.abs().amax(1, keepdim=True) / 127
        assert ((got[:, start : start + BLOCK] - block).abs() <= 0.501 * steps).all()


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen() -> None:
    values = torch.zeros(1, 3 * BLOCK)
    values[0, BLOCK] = float("inf")
    values[0, 2 * BLOCK] = float("nan")
    wire = torch.empty(1, num_bytes_of(3 * BLOCK), dtype=torch.uint8)
    encode(values, wire)
    got = decoded(wire, 3 * BLOCK)[0]
    assert not got[:BLOCK].any()
    assert not torch.isfinite(got[BLOCK : 2 * BLOCK].sum())
    assert not torch.isfinite(got[2 * BLOCK :].sum())
