"""Seconds by the clock: of every call alone, without touching the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from shardwise.errors import ModelError
from shardwise.layout import Layout
from shardwise.plan.partition import place
from shardwise.trace.timing import measure


class Uneven(nn.Module):
    """Three light layers and a heavy one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.heavy = nn.Sequential(nn.Linear(8, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.heavy(x).mean()


def test_every_call_has_seconds_and_the_model_is_left_alone() -> None:
    model = Uneven()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.ones(4, 8)).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    profile = measure(model, (torch.ones(4, 8),), repeats=2)

    assert all(call.forward_s is not None and call.forward_s > 0 for call in profile.calls)
    assert all(call.backward_s is not None and call.backward_s > 0 for call in profile.calls)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    after = [parameter.grad for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True) if b is not None)


def test_stages_are_balanced_by_what_was_measured() -> None:
    profile = measure(Uneven(), (torch.ones(4, 8),), repeats=2)

    stages = place(profile, Layout(pp=2))

    light = [stage for node, stage in stages.items() if profile.flow.nodes[node].name.startswith("layers")]
    assert light == [0, 0, 0], "the heavy part has a stage of its own"


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = Uneven()
    with pytest.raises(ModelError, match="real parameters, and layers"):
        measure(model, (torch.ones(4, 8),))
