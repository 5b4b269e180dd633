"""The arguments of a proof: other numbers with every seed, but masks that stay masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shardwise.parallel.tensor.instance import Call, Doubled


def given(tensor: torch.Tensor, *, seed: int) -> torch.Tensor:
    """What a proof makes of a tensor that the model does not compute."""
    (made,), _ = Call(args=(tensor,), kwargs={}, requires_grad=frozenset()).fresh(seed=seed)
    assert isinstance(made, torch.Tensor)
    return made


def test_a_mask_of_zeros_and_ones_stays_one_since_noise_times_a_million_would_hide_every_fault() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]])

    assert torch.equal(given(mask, seed=1), mask.double())
    assert torch.equal(given(mask, seed=2), mask.double())


def test_zeros_may_be_a_mask_or_be_added_so_that_they_are_both() -> None:
    zeros = torch.zeros(2, 3)

    assert bool(given(zeros, seed=1).all())
    assert not given(zeros, seed=2).any()


def test_hidden_places_stay_hidden_and_others_get_numbers_of_their_own() -> None:
    bias = torch.tensor([0.5, torch.finfo(torch.float32).min])

    assert given(bias, seed=1)[1] == bias[1]
    assert given(bias, seed=1)[0] != given(bias, seed=2)[0]


def grouped_product(width: int, out: int, dtype: torch.dtype) -> torch.Tensor:
    """Of two groups of rows, forward and backward."""
    rows = torch.ones(5, width, dtype=dtype, requires_grad=True)
    weights = torch.ones(2, out, width, dtype=dtype, requires_grad=True)
    product = F.grouped_mm(rows, weights.transpose(-2, -1), offs=torch.tensor([2, 5], dtype=torch.int32))
    product.square().sum().backward()
    return product.detach()


@pytest.mark.parametrize("width, out", [(8, 4), (8, 6), (6, 8)])
def test_a_grouped_product_in_a_proof_refuses_the_widths_that_it_refuses_in_a_run(width: int, out: int) -> None:
    if width % 4 or out % 4:
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            grouped_product(width, out, torch.float32)
        with Doubled(), pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            grouped_product(width, out, torch.float64)
    else:
        with Doubled():
            assert torch.equal(grouped_product(width, out, torch.float64), torch.full((5, out), float(width)).double())
