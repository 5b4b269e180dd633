"""A forward and its backward see one version of the weights, whatever is written in between."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.errors import DataflowError
from shardwise.execute.weight_sums import SMALLEST, WeightSums
from shardwise.execute.weight_versions import WeightVersions

WIDTH = 16


class Reader(nn.Module):
    """Reads its weights as models do: plainly, transposed, in part, twice, tied, in functions of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.free = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.squared = nn.Parameter(torch.randn(WIDTH))
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (batch, length)
        x = self.embed(tokens)
        x = self.norm(torch.tanh(self.first(x)) @ self.free.t()) + self.frozen
        x = self.batch_norm(x.transpose(1, 2))
        x = self.conv(x).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = Square.apply(x, self.squared)
        x = x * self.free[:2].exp().mean(0)
        return F.cross_entropy((x @ self.embed.weight.t()).flatten(0, 1), tokens.flatten())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return x * w * w

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        return dy * w * w, (dy * x * 2 * w).sum((0, 1))


def batch(number: int) -> torch.Tensor:
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(number))


def gradients_alone(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    model.zero_grad()
    model(tokens).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def taken(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def versions_of(model: nn.Module, newest: int = 0) -> WeightVersions:
    return WeightVersions([p for p in model.parameters() if p.requires_grad], newest=newest)


def move(model: nn.Module) -> None:
    """An update that changes every gradient."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.mul_(0.7).add_(0.05 * (number % 3 + 1))


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == wanted.keys()
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_backward_computes_with_the_version_of_its_forward() -> None:
    model = Reader()
    versions = versions_of(model)
    wanted = gradients_alone(model, batch(0))
    loss = model(batch(0))  # version 0
    with versions.renewing():
        move(model)
    others = gradients_alone(model, batch(1))
    other_loss = model(batch(1))  # version 1
    versions.show(0)
    loss.backward()
    assert equal(taken(model), wanted)
    versions.show(1)
    other_loss.backward()
    assert equal(taken(model), others)


def test_a_backward_that_is_shown_the_newer_version_is_wrong_without_an_error() -> None:
    """Why the version is shown again: autograd keeps the parameter, not its value, and says nothing."""
    model = Reader()
    versions = versions_of(model)
    wanted = gradients_alone(model, batch(0))
    loss = model(batch(0))
    with versions.renewing():
        move(model)
    loss.backward()
    assert not equal(taken(model), wanted)


def test_an_update_under_a_graph_of_the_newest_version_leaves_that_graph_right() -> None:
    """W(n+1) is written while forwards with W(n) wait for their backwards: into other memory, and unnoticed."""
    model = Reader()
    versions = versions_of(model)
    with versions.renewing():
        move(model)
    wanted = gradients_alone(model, batch(2))
    loss = model(batch(2))  # version 1
    with versions.renewing():
        move(model)  # version 2, over version 0
    assert versions.newest == versions.shown == 2
    versions.show(1)
    loss.backward()
    assert equal(taken(model), wanted)


def test_an_optimizer_steps_from_the_newest_version_though_another_is_shown() -> None:
    model, alone = Reader(), Reader()
    versions = versions_of(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, fused=True) for m in (model, alone)]
    for step in range(3):
        for m, optimizer in zip((model, alone), optimizers, strict=True):
            for p in m.parameters():
                p.grad = torch.full_like(p, 0.1 * (step - 1)) if p.requires_grad else None
            with versions.renewing() if m is model else torch.no_grad():
                optimizer.step()
        versions.show(versions.newest - 1)
    versions.show(versions.newest)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_sum_in_place_is_of_the_shown_version_too() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))
    assert model[0].weight.numel() >= SMALLEST
    x, sums = torch.randn(4, 512), WeightSums()
    sums.install(model, ["0", "2"], dict(model.named_parameters()))
    versions = versions_of(model)
    wanted = {n: 2 * g for n, g in plain_gradients(model, x).items()}
    with sums.running():
        losses = [model(x).square().sum() for _ in range(2)]
        with versions.renewing():
            move(model)
        for place, loss in enumerate(losses):
            versions.show(0)
            with sums.adding(place > 0):
                loss.backward()
    sums.close()
    for name, gradient in taken(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5)


def plain_gradients(model: nn.Sequential, x: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(model(x).square().sum(), list(parameters.values())), strict=True))


def test_a_version_that_is_gone_is_refused_with_those_that_there_are() -> None:
    versions = versions_of(nn.Linear(2, 2), newest=5)
    with versions.renewing():
        pass
    with pytest.raises(DataflowError, match="5 and 6, but 4 is asked for"):
        versions.show(4)


def test_the_older_version_can_be_read_and_written() -> None:
    layer = nn.Linear(2, 2)
    versions = versions_of(layer)
    with versions.renewing():
        move(layer)
    older = versions.older()[id(layer.bias)].clone()
    versions.older()[id(layer.bias)].fill_(3.0)
    versions.show(0)
    assert not torch.equal(older, layer.bias)
    assert layer.bias.tolist() == [3.0, 3.0]
