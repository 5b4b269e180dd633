"""Parameters become narrow in place; their masters get float32 gradients and give their values back."""

from __future__ import annotations

import torch
import torch.nn as nn

from shardwise.parallel.precision.masters import Masters, gradient_dtype


def test_gradients_are_summed_in_float32_and_become_those_of_the_masters() -> None:
    layer = nn.Linear(4, 3, bias=False)
    exact = layer.weight.detach().clone()
    masters = Masters(["weight"], torch.bfloat16)
    parameter = layer.weight
    masters.take({"weight": parameter})
    assert layer.weight is parameter
    assert parameter.dtype == torch.bfloat16
    assert gradient_dtype(parameter) == torch.float32
    x = torch.full((1, 4), 2.0**-6, dtype=torch.bfloat16)
    layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    for _ in range(3):
        layer(x).sum().backward()
    masters.collect()
    master = masters.of("weight", parameter)
    assert parameter.grad is None
    assert torch.equal(master.detach(), exact)
    assert master.grad is not None
    # bfloat16 would lose what is 64 times smaller
    assert torch.equal(master.grad, torch.full((3, 4), 1.0 + 3 * 2.0**-6))
    layer(x).sum().backward()
    masters.collect()
    assert torch.equal(master.grad, torch.full((3, 4), 1.0 + 4 * 2.0**-6))


def test_small_updates_are_not_lost() -> None:
    parameter = nn.Parameter(torch.ones(2))
    masters = Masters(["w"], torch.bfloat16)
    masters.take({"w": parameter})
    master = masters.of("w", parameter)
    for _ in range(8):  # each is half of what bfloat16 can tell from one
        master.data.add_(2.0**-9)
        masters.cast()
    assert torch.equal(parameter.data, torch.full((2,), 1.0 + 2.0**-6, dtype=torch.bfloat16))


def test_what_is_frozen_is_narrow_without_a_master_and_other_names_are_left_alone() -> None:
    frozen, other = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    masters = Masters(["frozen"], torch.float16)
    masters.take({"frozen": frozen, "other": other})
    assert frozen.dtype == torch.float16
    assert other.dtype == torch.float32
    assert "frozen" not in masters
    assert masters.of("other", other) is other


def test_a_master_is_given_away_once() -> None:
    parameter = nn.Parameter(torch.tensor([1.0 + 2.0**-12]))
    masters = Masters(["w"], torch.bfloat16)
    masters.take({"w": parameter})
    value = masters.give("w")
    assert value is not None
    assert value.item() == 1.0 + 2.0**-12
    assert masters.give("w") is None
    parameter.grad = torch.ones(1)
    masters.collect()  # is its new owner's to collect
    assert parameter.grad is not None


def test_parameters_get_the_masters_values_back() -> None:
    parameter = nn.Parameter(torch.tensor([1.0 + 2.0**-12]))
    masters = Masters(["w"], torch.bfloat16)
    masters.take({"w": parameter})
    masters.put_back()
    assert parameter.dtype == torch.float32
    assert parameter.item() == 1.0 + 2.0**-12
