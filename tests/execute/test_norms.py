"""Norms are exact enough to be the same on every layout."""

from __future__ import annotations

import pytest
import torch

from shardwise.execute.norms import CHUNK, share_of, sum_of_squares


def test_millions_of_float32_elements_lose_nothing_that_a_tolerance_would_see() -> None:
    gradient = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(gradient.double().square().sum())
    assert abs(float(sum_of_squares([gradient])) / exact - 1) < 1e-7


def test_parts_of_a_tensor_add_up_to_the_whole() -> None:
    gradient = torch.randn(301, CHUNK // 2 + 7, generator=torch.Generator().manual_seed(1))
    parts = [gradient[:, :500], gradient[:, 500:]]
    whole = float(sum_of_squares([gradient]))
    assert abs(float(sum_of_squares(parts)) / whole - 1) < 1e-7


def test_small_tensors_scalars_and_none_at_all() -> None:
    assert float(sum_of_squares([torch.tensor(3.0), torch.tensor([[4.0]])])) == 25.0
    assert float(sum_of_squares([])) == 0.0


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(), (5,), (3, CHUNK), (7, CHUNK // 2 + 3)])
def test_shares_of_a_gradient_have_each_element_once_and_none_has_two_chunks_more(
    size: int, shape: tuple[int, ...]
) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    shares = [share_of(gradient, place, size) for place in range(size)]
    torch.testing.assert_close(torch.cat(shares), gradient.reshape(-1), rtol=0, atol=0)
    assert max(map(len, shares)) - min(map(len, shares)) < 2 * CHUNK
