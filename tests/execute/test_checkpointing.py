"""A model's own activation checkpointing keeps its gradients, with dropout, on any stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from models import Example, make
from torch.utils.checkpoint import checkpoint

from one_process import Gradients, traced, worst_error
from shardwise.errors import ModelError


def gradients_of(example: Example, num_stages: int) -> Gradients:
    trace = traced(example)
    return trace.run(trace.cut(num_stages))[1]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_checkpointed_layers_have_the_gradients_of_plain_ones(name: str, reentrant: bool) -> None:
    example = make(name)
    plain = gradients_of(example, 1)
    example.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert worst_error(gradients_of(example, 2), plain) <= 1e-6


class Half(nn.Module):
    """Checkpoints a part of itself, behind a draw of its own."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)
        self.reentrant = reentrant
        self.runs = 0

    def part(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.dropout(torch.tanh(self.b(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.a(x))
        return self.part(x) if self.reentrant is None else checkpoint(self.part, x, use_reentrant=self.reentrant)


class Whole(nn.Module):
    def __init__(self, reentrant: bool | None = None, *, around: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Half(reentrant) for _ in range(3))
        self.around = around

    def two(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.two, x, use_reentrant=False) if self.around else self.two(x)
        return self.layers[2](x).square().mean()


class OneByOne(Whole):
    """Checkpoints every layer from outside."""

    def two(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:2]:
            x = checkpoint(layer, x, use_reentrant=self.around_reentrant)
        return x

    around_reentrant = False


def example(model: nn.Module) -> Example:
    return Example(model=model, batch=(torch.linspace(-1, 1, 48).view(8, 6),))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_of_a_unit_is_run_again_with_the_same_numbers(reentrant: bool) -> None:
    plain = gradients_of(example(Whole()), 1)
    model: Any = Whole(reentrant)
    assert worst_error(gradients_of(example(model), 2), plain) <= 1e-6
    assert [layer.runs for layer in model.layers] == [2, 2, 2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_unit_that_is_checkpointed_from_outside_is_run_again_with_the_same_numbers(reentrant: bool) -> None:
    plain = gradients_of(example(Whole()), 1)
    model: Any = OneByOne()
    model.around_reentrant = reentrant
    assert worst_error(gradients_of(example(model), 3), plain) <= 1e-6
    assert [layer.runs for layer in model.layers] == [2, 2, 1]


def test_checkpointing_around_several_units_is_refused() -> None:
    with pytest.raises(ModelError, match="holds 2: layers.0, layers.1; name the module around them"):
        traced(example(Whole(around=True)))
