"""What a batch does not use of a unit."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn as nn

from parallel.tensor.blocks import call_of
from shardwise.parallel.tensor.unused import called_or_not, unused
from shardwise.trace.tape import AtAttribute


class Routed(nn.Module):
    """Every token goes to one of two layers; a third is for those who ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.asked = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor, ask: bool = False) -> torch.Tensor:
        first = x[:, :1].mean() > 0.5
        return (self.asked if ask else self.positive if bool(first) else self.negative)(x)


def test_what_other_numbers_would_use_is_not_unused() -> None:
    assert unused(Routed().double(), [call_of(1, 4)]) == {"asked.weight", "asked.bias"}


def test_the_unit_is_left_as_it_was() -> None:
    unit = Routed().double().eval()
    unit.asked.weight.requires_grad_(False)
    unused(unit, [call_of(1, 4)])

    assert not unit.training
    assert not unit.asked.weight.requires_grad
    assert unit.positive.weight.grad is None


def test_reasons_say_what_is_not_called() -> None:
    assert called_or_not("a: no row; b: it is odd", {"b.weight"}) == "a: no row; b: not called with this batch"


def test_what_is_left_for_the_loss_is_used() -> None:
    class Routing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.logits = self.router(x)
            return x * 2

    call = call_of(2, 4)
    assert unused(Routing().double(), [call]) == {"router.weight", "router.bias"}
    read = dataclasses.replace(call, extras=frozenset({AtAttribute("", "logits", ())}))
    assert unused(Routing().double(), [read]) == frozenset()
