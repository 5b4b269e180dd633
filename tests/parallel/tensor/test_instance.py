"""The arguments of a proof: other numbers with every seed, but masks that stay masks."""

from __future__ import annotations

import torch

from shardwise.parallel.tensor.instance import Call


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
