"""A unit splits its backward only where both halves have been seen to make the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.execute.split_proof import SplitProof, in_words, prove_splits
from shardwise.execute.weight_sums import WeightSums
from shardwise.launch import RankContext
from shardwise.parallel.tensor.calls import kinds_of
from shardwise.testing import on_ranks

WIDTH = 6


class Good(nn.Module):
    """Linear, dropout, norm: the norm's weights do not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + nn.functional.dropout(torch.tanh(self.linear(x)), 0.3, self.training))


class Plain(Good):
    """A matrix that no layer multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x @ self.matrix.cos())


class InCode(Good):
    """A matrix that the code of the unit multiplies with, and a stack of them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.stack = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(2, WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x @ self.matrix.t())
        return super().forward(nn.functional.linear(x, self.stack[1]) + x.matmul(self.stack[0]))


class Overwrites(torch.autograd.Function):
    """A backward that writes into the gradient it is given, which others have kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0].mul_(2.0)


class Bad(Good):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = Overwrites.apply(x)
        return y + self.linear(y.detach()) + Overwrites.apply(self.linear(x))


class Late(Good):
    """The gradient that its linear layer has kept is written into afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Overwrites.apply(x) + self.linear(x.detach())


class Doubled(torch.autograd.Function):
    """The weight itself; its gradient is twice as large."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * 2.0


class Gated(Good):
    """A matrix whose gradient is changed on its way, behind a gate that is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.gate = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.gate * nn.functional.linear(x, Doubled.apply(self.matrix))


class Hidden(Good):
    """What it computes is read through an attribute; its output has no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.computed = super().forward(x)
        return x.detach() * 1.0


class OnOneRank(InCode):
    """Only one rank fails; all wait for one another in the forward."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.bad = Late() if fails else Good()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(torch.ones(()))
        out: torch.Tensor = self.bad(super().forward(x))
        return out


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def somewhere(here: bool) -> bool:
    """Whether it is so on one of all ranks."""
    count = torch.tensor(int(here))
    dist.all_reduce(count)
    return bool(count)


def proven(model: nn.Module) -> tuple[WeightSums, tuple[SplitProof, ...]]:
    names = [f"layers.{place}" for place in range(len(model.layers))]
    kinds = kinds_of(model, (torch.randn(8, WIDTH),), units=names)
    sums = WeightSums()
    sums.install(model, names, dict(model.named_parameters()))
    return sums, prove_splits(sums, {name: model.get_submodule(name) for name in names}, kinds)


def test_units_that_are_alike_are_proven_once_and_left_as_they_were() -> None:
    model = Model(Good(), Good(), Good(), Plain())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sums, proofs = proven(model)
    assert [str(proof) for proof in proofs] == [
        "layers.0: split backward, 100% of the weights wait for W",  # its input has no gradient
        "layers.1 and 1 more: split backward, 100% of the weights wait for W",
        "layers.3: split backward, 50% of the weights wait for W",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    sums.close()


def test_products_in_the_code_of_a_unit_are_put_off_where_layers_are_not_all() -> None:
    sums, proofs = proven(Model(Good(), InCode(), InCode()))
    assert [(proof.units, proof.share) for proof in proofs] == [(("layers.0",), 1.0), (("layers.1", "layers.2"), 1.0)]
    assert [unit for unit, _, _ in sums._watched] == ["layers.1", "layers.2"]
    sums.unwatch()
    sums.close()


@pytest.mark.parametrize("bad", [Late, Bad])
def test_a_unit_whose_halves_are_not_the_whole_keeps_it_and_is_named(bad: type[nn.Module]) -> None:
    sums, proofs = proven(Model(Good(), bad()))
    good, refused = proofs
    assert not good.why
    assert refused.units == ("layers.1",)
    assert refused.share == 0
    assert "written into" in refused.why or "differs" in refused.why
    assert [layer.splits for layer in sums._layers.values()] == [True, False]
    sums.close()


def test_a_unit_that_was_not_called_is_proven_by_one_that_is_alike_or_keeps_its_whole_backward() -> None:
    model = Model(Good())
    kinds = kinds_of(model, (torch.randn(8, WIDTH),), units=["layers.0"])
    modules = {"layers.0": model.layers[0], "alike": Good(), "other": Plain()}
    first, unknown = prove_splits(WeightSums(), modules, kinds)
    assert (first.units, first.why) == (("layers.0", "alike"), "")
    assert (unknown.units, unknown.why) == (("other",), "it was not called when the model was traced")
    assert in_words([first, unknown, first]) == (
        "split backward: proven equal to the whole one of 2 units, before the first step",
        "other: whole backward: it was not called when the model was traced",
    )


def test_a_gate_that_is_zero_at_first_hides_no_wrong_gradient_behind_it() -> None:
    model = Model(Good(), Gated())
    sums, (_, gated) = proven(model)
    assert gated.share == 0.5  # the linear layer; not the matrix, whose gradient the queue would get wrong
    assert sums._watched == []
    assert float(model.layers[1].gate.detach()) == 0
    sums.close()


def test_a_unit_that_has_no_gradient_when_called_by_itself_keeps_its_whole_backward() -> None:
    sums, (_, hidden) = proven(Model(Good(), Hidden()))
    assert hidden.why == "called by itself it has no gradients, so nothing is proven"
    sums.close()


@on_ranks(2)
def test_what_fails_on_one_rank_is_whole_on_all_and_all_go_on_alike(rank: RankContext) -> None:
    model = Model(Good(), OnOneRank(rank.rank == 1))
    names = [f"layers.{place}" for place in range(2)]
    kinds = kinds_of(model, (torch.randn(8, WIDTH),), units=names)
    sums = WeightSums()
    sums.install(model, names, dict(model.named_parameters()))
    modules = {name: model.get_submodule(name) for name in names}
    _, proof = prove_splits(sums, modules, kinds, anywhere=somewhere)
    assert proof.why if rank.rank == 1 else proof.why == "not so on another rank"
    calls = torch.ones(())
    dist.all_reduce(calls)  # nothing of the proof is left over on one of them
    assert float(calls) == 2
    sums.close()
