"""Tracing tells what a model holds and does, allocates nothing, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from shardwise.errors import ModelError
from shardwise.trace.capture import capture
from shardwise.trace.profile import trace

torch.set_num_threads(1)


class Tied(nn.Module):
    """An embedding that shares its weight with the head, a parameter of the glue, a frozen unit, a spare."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.spare = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.ones(3))

    def forward(self, ids):
        return self.head(self.frozen(self.body(self.embed(ids))) * self.scale)


def loss(outputs, batch):
    return outputs.logsumexp(-1).mean()


UNITS = ("embed", "body", "frozen", "spare", "head")
BATCH = (torch.tensor([[1, 2, 3]]),)


def traced(model=None):
    return trace(model or Tied(), BATCH, loss=loss, units=UNITS)


def test_units_hold_parameters_by_the_names_of_the_model() -> None:
    profile = traced()
    held = {unit.name: list(unit.parameters) for unit in profile.units}
    assert held["head"] == ["embed.weight"]
    assert held["body"] == ["body.weight", "body.bias"]
    assert profile.tied == {"embed.weight": ("head.weight",)}
    assert list(profile.glue_parameters) == ["scale"]
    assert profile.unread == ("spare.weight", "spare.bias")
    assert profile.num_parameters == sum(parameter.numel() for parameter in Tied().parameters())
    assert profile.buffer_bytes == 12


def test_frozen_parameters_are_not_trainable_and_cost_half_the_backward() -> None:
    profile = traced()
    assert not profile.parameters["frozen.weight"].trainable
    calls = {call.unit: call for call in profile.calls}
    assert calls["frozen"].backward_flops == calls["frozen"].forward_flops
    assert calls["body"].backward_flops == 2 * calls["body"].forward_flops


def test_the_dataflow_is_that_of_a_capture() -> None:
    model = Tied()
    assert traced(model).flow == capture(model, BATCH, loss=loss, units=UNITS).tape.flow


def test_a_model_on_meta_is_traced_as_a_real_one() -> None:
    model = Tied()
    real = traced(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    model.head.weight = model.embed.weight
    assert traced(model) == real


def test_the_model_is_left_as_it_was() -> None:
    model = Tied()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    traced(model)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(ModelError, match="a loss is needed"):
        trace(Tied(), BATCH)


class Looks(nn.Module):
    """A unit that looks at its own values, as routers do: it runs on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.first(x)
        return self.inner(hidden) if bool(hidden.sum() > 0) else self.inner(-hidden)


def test_where_the_backward_does_not_get_through_it_is_taken_as_twice_the_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Looks(), nn.Linear(4, 4))
    profile = trace(model, (torch.randn(2, 4),), loss=lambda o, b: o.mean(), units=("0", "1", "2"))
    linear = 2 * 2 * 4 * 4
    assert [call.forward_flops for call in profile.calls] == [linear, 2 * linear, linear]
    assert [call.backward_flops for call in profile.calls] == [2 * linear, 4 * linear, 2 * linear]
