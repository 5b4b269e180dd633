"""What layers depend on is read off in as many backward passes as there are layers and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from parallel.tensor.blocks import call_of
from parallel.tensor.state_space import Mixer
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.supports import Leaf, supports


class Repeated(nn.Module):
    """A cell that is called for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x[:, 0]
        for token in range(x.shape[1]):
            state = self.down((self.up(state) + self.up(x[:, token])).tanh())
        return state


def test_a_layer_that_is_called_often_is_looked_at_once_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    once = torch.autograd.grad

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return once(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    found = supports(random_copy(Repeated()), call_of(2, 12, 8), tp=2)

    assert len(passes) == 2 * 2 + 1  # layers, ranks; what is returned
    halves = (frozenset(range(8)), frozenset(range(8, 16)))
    assert found.needs["down"][Leaf(kind="layer", name="up")] == {1: halves}


def test_a_norm_with_a_gate_reads_both_of_its_inputs() -> None:
    found = supports(random_copy(Mixer()), call_of(2, 5, 16), tp=2, cut_at=frozenset({"norm"}))
    halves = found.needs["norm"][Leaf(kind="layer", name="in_proj")][2]

    assert frozenset(range(16)) <= halves[0]  # the gate's half
    assert frozenset(range(32, 48)) <= halves[0]  # that of x
    assert not halves[0] & frozenset(range(16, 32))
