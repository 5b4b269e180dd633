"""Seconds by the clock: of every call alone, without touching the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwise.errors import ModelError
from shardwise.layout import Layout
from shardwise.plan.partition import place
from shardwise.trace.deferred import defer
from shardwise.trace.placing import place as place_values
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


class WithStatistics(nn.Module):
    """A parameter that glue reads, a tied one, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.second = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
        self.third = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.third[0].weight = self.first[0].weight
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.third(self.second(self.first(x) * self.scale))).mean()


def test_values_are_asked_for_unit_by_unit_and_statistics_stay() -> None:
    blueprint = defer(WithStatistics, seed=1)
    model = blueprint.module
    place_values(model, blueprint.materialize([name for name, _ in model.named_buffers()]))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    asked: list[str] = []

    def values(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        asked.extend(names)
        return blueprint.materialize(names)

    profile = measure(model, (torch.ones(4, 4),), units=["first", "second", "third"], repeats=1, values=values)

    assert all(call.forward_s for call in profile.calls)
    assert asked[0] == "scale", "glue reads it all along"
    assert asked.count("first.0.weight") == 2, "once for each unit that holds it"
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert all(isinstance(parameter.data, FakeTensor) for parameter in model.parameters())
