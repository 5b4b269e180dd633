"""Weight gradients that are summed in place are the gradients that autograd would have summed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shardwise.execute.weight_sums import SMALLEST, WeightSums
from shardwise.plan.works import ADDED_IN_PLACE

WIDTH = 512  # WIDTH * WIDTH is above weight_sums.SMALLEST
VOCABULARY = 2048
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Tied(nn.Module):
    """Embedding, two linears, a head that shares the embedding's table."""

    def __init__(self, *, padding: int | None = None, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.first = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.second = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = torch.tanh(self.first(x))
        x = self.second(x) + self.second(x * 0.5)  # one weight, read twice
        return self.head(x)


def ids() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (2, 5), generator=random) for _ in range(3)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def gradients(model: nn.Module, *, in_place: bool, adds: bool = True, loss: Loss = loss_of) -> dict[str, torch.Tensor]:
    sums = WeightSums()
    if in_place:
        sums.install(model, ["embed", "first", "second", "head"], dict(model.named_parameters()))
    with sums.running():
        for batch in ids():
            value = loss(model, batch)
            with sums.adding(adds):
                value.backward()
    sums.close()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_equal(model: nn.Module, *, loss: Loss = loss_of, adds: bool = True) -> None:
    expected = gradients(model, in_place=False, loss=loss)
    got = gradients(model, in_place=True, adds=adds, loss=loss)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 1e-6, f"{name}: {error}"  # float32, another order of three additions


def test_gradients_over_micro_batches_are_those_of_autograd_with_tied_weights_and_a_weight_read_twice() -> None:
    assert_equal(Tied())


def test_a_padding_row_of_an_embedding_has_no_gradient() -> None:
    model = Tied(padding=0)
    model.head.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    assert_equal(model, loss=lambda m, batch: loss_of(m, batch * (batch > 100)))
    found = gradients(model, in_place=True, loss=lambda m, batch: loss_of(m, batch * (batch > 100)))
    assert found["embed.weight"][0].abs().max() == 0


def test_a_backward_that_does_not_add_gives_gradients_to_autograd() -> None:
    assert_equal(Tied(), adds=False)


class Made(TorchDispatchMode):
    """Names of the operations that made a tensor as large as the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= WIDTH * WIDTH and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return out


def test_no_gradient_of_a_weights_size_is_made_after_the_first_micro_batch() -> None:
    model = nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH, bias=False)})
    sums = WeightSums()
    sums.install(model, ["first"], dict(model.named_parameters()))
    names: list[list[str]] = []
    for adds in (True, True, False):  # the first has nothing to add to
        with sums.running():
            value = model["first"](torch.ones(3, WIDTH)).sum()
            with Made() as made, sums.adding(adds):
                value.backward()
        names.append(made.names)
    assert names[0] == ["mm"]
    assert names[1] == ["addmm_"]
    assert "mm" in names[2]


def test_hooks_of_the_user_see_every_gradient() -> None:
    model = Tied()
    seen: list[float] = []
    model.first.weight.register_hook(lambda gradient: seen.append(float(gradient.norm())))
    model.second.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(-1.0))
    assert_equal(model)
    assert len([value for value in seen if value > 0]) == 6
    assert len([value for value in seen if value < 0]) == 6


def test_double_backward_and_gradients_asked_for_in_a_forward_are_torchs_own() -> None:
    def with_penalty(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        x = model.embed(batch)
        energy = torch.tanh(model.first(x)).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force.square().mean() + loss_of(model, batch)

    assert_equal(Tied(), loss=with_penalty)


def test_checkpointed_modules_sum_in_their_repetition() -> None:
    def checkpointed(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        x = checkpoint(lambda t: torch.tanh(model.first(t)), model.embed(batch), use_reentrant=False)
        return model.head(x).square().mean()

    assert_equal(Tied(), loss=checkpointed)


def test_frozen_weights_and_autocast_are_left_alone() -> None:
    model = Tied()
    model.first.weight.requires_grad_(False)
    assert_equal(model)

    def cast(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model, batch).float()

    assert_equal(Tied(), loss=cast)


@pytest.mark.parametrize("kind", ["subclass", "patched", "sparse", "max_norm"])
def test_modules_that_do_not_fit_keep_their_forward(kind: str) -> None:
    class Own(nn.Linear):
        pass

    patched = nn.Linear(WIDTH, WIDTH)
    patched.forward = own = lambda x: 2 * x
    module = {
        "subclass": Own(WIDTH, WIDTH),
        "patched": patched,
        "sparse": nn.Embedding(VOCABULARY, WIDTH, sparse=True),
        "max_norm": nn.Embedding(VOCABULARY, WIDTH, max_norm=1.0),
    }[kind]
    model = nn.ModuleDict({"unit": module})
    sums = WeightSums()
    sums.install(model, ["unit"], dict(model.named_parameters()))
    assert vars(module).get("forward") is (own if kind == "patched" else None)


def test_closing_gives_the_modules_their_own_forward_back() -> None:
    model = Tied()
    sums = WeightSums()
    sums.install(model, ["first", "head"], dict(model.named_parameters()))
    assert "forward" in vars(model.first)
    sums.close()
    assert "forward" not in vars(model.first)
    assert "forward" not in vars(model.head)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_keeps_the_names_of_its_arguments(layer: nn.Module) -> None:
    """Who divides units among ranks finds arguments by them."""
    before = list(inspect.signature(layer.forward).parameters)
    model, sums = nn.Sequential(layer), WeightSums()
    sums.install(model, ["0"], dict(model.named_parameters()))
    assert "forward" in vars(layer)
    assert list(inspect.signature(layer.forward).parameters) == before
    sums.close()


def test_the_plan_knows_from_which_size_on_gradients_are_summed_in_place() -> None:
    assert ADDED_IN_PLACE == SMALLEST
