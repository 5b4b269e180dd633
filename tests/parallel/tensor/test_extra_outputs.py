"""What a unit leaves elsewhere than in what it returns is compared too, and its gradient with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.calls import kinds_of
from shardwise.parallel.tensor.extra_outputs import AtModule, picked_up
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.prove import Difference, prove
from shardwise.trace.tape import AtArgument, AtAttribute

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))

# One gate for all columns, which the divided region reads whole: a fork, if nobody else reads it.
PLAN = UnitPlan(
    copies=("up",),
    forks=("gate",),
    reduces=("down",),
    slices={"up.weight": Slice.even(0, 32, 2), "up.bias": Slice.even(0, 32, 2), "down.weight": Slice.even(1, 32, 2)},
)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 1), nn.Linear(16, 32), nn.Linear(32, 16)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x)

    def forward(self, x: torch.Tensor, seen: list[torch.Tensor] | None = None) -> torch.Tensor:
        gate = self.gated(x)
        self.left = gate
        if seen is not None:
            seen.append(gate)
        return x + self.down(self.up(x).relu() * gate)


class Model(nn.Module):
    """`penalty` reads what the gate says from somewhere."""

    def __init__(self, block: nn.Module, penalty: Callable[[Any, list[torch.Tensor]], torch.Tensor]) -> None:
        super().__init__()
        self.blocks, self.penalty = nn.ModuleList([block]), penalty

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        taken: list[torch.Tensor] = []
        block = self.blocks[0]
        handle = block.gate.register_forward_hook(lambda module, args, out: taken.append(out))
        try:
            y = block(x, seen)
        finally:
            handle.remove()
        return y.square().mean() + self.penalty(block, [*seen, *taken]).square().mean()


READERS: dict[str, tuple[Callable[[Any, list[torch.Tensor]], torch.Tensor], type]] = {
    "an attribute": (lambda block, seen: block.left, AtAttribute),
    "a list that is an argument": (lambda block, seen: seen[0], AtArgument),
    "a hook": (lambda block, seen: seen[1], AtModule),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_fork_that_the_loss_reads_too_is_refused(reader: str) -> None:
    penalty, place = READERS[reader]
    (kind,) = kinds_of(Model(Gated(), penalty), (X,))
    (extra,) = kind.calls[0].extras
    unit = random_copy(kind.module)

    alone = dataclasses.replace(kind.calls[0], extras=frozenset())
    prove(unit, alone, PLAN, tp=2, training=True)  # nobody else reads it: equal
    with pytest.raises(Difference, match=r"gradient of "):
        prove(unit, kind.calls[0], PLAN, tp=2, training=True)
    # a hook is told by the output's leaf of the gate, whichever of the three places has it first
    assert isinstance(extra, (place, AtModule))


def test_a_plan_leaves_what_the_loss_reads_as_it_is_on_one_device() -> None:
    free = plan_tensor(Model(Gated(), lambda block, seen: torch.zeros(1)), (X,), tp=2)
    read = plan_tensor(Model(Gated(), lambda block, seen: block.left), (X,), tp=2)

    assert free.units["blocks.0"].forks == ("gate",)
    assert read.units["blocks.0"].forks == ()


def test_units_whose_extras_are_read_are_of_another_kind() -> None:
    class Two(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x.square().mean() + self.penalty(self.blocks[0], []).square().mean()

    model = Two(Gated(), lambda block, seen: block.left)
    model.blocks.append(Gated())

    assert [kind.units for kind in kinds_of(model, (X,))] == [["blocks.0"], ["blocks.1"]]


def test_what_a_call_has_not_left_is_not_there() -> None:
    unit = Gated()
    with picked_up(unit, [AtModule("gate", 1, 0, True), AtAttribute("up", "left", ())]) as left:
        unit(X)
    assert left(((X,), {})) == {}


class Cache:
    """Keys by layer, in an object of its own."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


class Fills(Gated):
    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        cache.keys.append(self.up(x))
        return x + self.down(self.up(x).relu())


class Reads(Gated):
    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        return x + self.down(self.up(x).relu() * cache.keys[0])


class Through(nn.Module):
    """Two blocks that share a cache, and one that does not look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Fills(), Reads(), Gated()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        fills, reads, gated = self.layers
        return gated(reads(fills(x, cache), cache)).square().mean()


def test_blocks_that_hand_each_other_tensors_in_an_object_stay_whole() -> None:
    """A proof of one alone would not know of the other's gradient."""
    plan = plan_tensor(Through(), (X,), tp=2)
    assert list(plan.units) == ["layers.2"]
    assert plan.reasons["layers.0"] == "layers.1 reads what it leaves in an object that is not looked into"
    assert plan.reasons["layers.1"] == "it reads what layers.0 leaves in an object that is not looked into"
