"""Right plans are proven, wrong ones are refused by the first tensor that differs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn

from parallel.tensor.blocks import Block, call_of, hand_plan
from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.instance import Call, random_copy
from shardwise.parallel.tensor.prove import Difference, prove

CALL = call_of(2, 3, 16)


def proven(plan: UnitPlan, block: nn.Module | None = None, *, tp: int = 2, complete: bool = False) -> UnitPlan:
    unit = random_copy(Block() if block is None else block)
    done, error = prove(unit, CALL, plan, tp=tp, training=True, complete=complete)
    assert error < 1e-9
    return done


def test_a_plan_written_by_hand_is_proven() -> None:
    proven(hand_plan())


def test_a_norm_between_heads_whose_gradient_is_not_summed_is_refused() -> None:
    with pytest.raises(Difference, match=r"gradient of attention.norm.weight differs"):
        proven(dataclasses.replace(hand_plan(), partial=frozenset()))


def test_what_is_missing_in_a_plan_shows_in_the_comparison() -> None:
    done = proven(dataclasses.replace(hand_plan(), partial=frozenset()), complete=True)

    assert done.partial == {"attention.norm.weight", "attention.norm.bias"}


def test_a_sum_left_out_is_refused() -> None:
    with pytest.raises(Difference, match="output 0 differs"):
        proven(dataclasses.replace(hand_plan(), reduces=("attention.o",)))


def test_an_input_gradient_that_is_not_summed_is_refused() -> None:
    with pytest.raises(Difference, match="gradient of "):
        proven(dataclasses.replace(hand_plan(), copies=("attention.q", "attention.k", "attention.v")))


def test_packed_gate_and_up_cut_through_the_middle_are_refused() -> None:
    slices = {**hand_plan().slices, "gate_up.weight": Slice.even(0, 64, 2), "gate_up.bias": Slice.even(0, 64, 2)}

    with pytest.raises(Difference, match="output 0 differs"):
        proven(dataclasses.replace(hand_plan(), slices=slices))


def test_a_bias_that_every_rank_adds_is_refused() -> None:
    # "down" as a column of nothing: its product is summed by hand, its bias with it
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)
            self.bias = nn.Parameter(nn.Linear(8, 16).bias.detach())

        def forward(self, x: object) -> object:
            return self.b(self.a(x)) + self.bias

    plan = UnitPlan(
        copies=("a",),
        reduces=("b",),
        slices={"a.weight": Slice.even(0, 8, 2), "b.weight": Slice.even(1, 8, 2)},
    )
    proven(plan, Summed())
    with pytest.raises(Difference, match="gradient of bias"):
        proven(dataclasses.replace(plan, partial=frozenset({"bias"})), Summed())


def test_dropout_masks_of_divided_heads_are_parts_of_the_whole_mask() -> None:
    block = Block(dropout=0.3)
    done = proven(hand_plan(), block, complete=True)

    assert done.draws == {0: Slice.even(1, 4, 2)}
    with pytest.raises(Difference, match="output 0 differs"):
        proven(hand_plan(), block)


def test_key_heads_that_two_ranks_share_are_summed() -> None:
    keys = Slice(dim=0, size=8, ranges=(((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),)))
    plan = dataclasses.replace(
        hand_plan(),
        slices={
            name: keys if ".k." in name or ".v." in name else Slice.even(part.dim, part.size, 4, _parts(name, part))
            for name, part in hand_plan().slices.items()
        },
        attributes={("attention", "num_heads"): (1,) * 4, ("attention", "num_kv_heads"): (1,) * 4},
    )

    proven(plan, tp=4)


def _parts(name: str, part: Slice) -> tuple[int, ...]:
    return (part.size // 2, part.size // 2) if name.startswith("gate_up") else ()


class Masked(nn.Module):
    """What a mask of zeros and ones leaves of scores; a random mask hides all but one."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(16, 16, bias=False)
        self.out = nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.out((self.scores(x) - 1e6 * (1 - mask)).softmax(-1))


def masked(*, invented: bool) -> Call:
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(2, 3, 16, generator=generator), torch.ones(2, 3, 16)
    if invented:
        mask = torch.randn(2, 3, 16, generator=generator)
    return Call(args=(x, mask), kwargs={}, requires_grad=frozenset({0}), invented=frozenset({1} if invented else set()))


@pytest.mark.parametrize("invented", [True, False])
def test_a_mask_that_hides_what_a_weight_does_proves_nothing_of_it(invented: bool) -> None:
    right = UnitPlan(
        copies=("scores",), alone={"scores": Slice.even(2, 16, 2)}, slices={"scores.weight": Slice.even(0, 16, 2)}
    )
    swapped = {"scores.weight": Slice(dim=0, size=16, ranges=(((8, 16),), ((0, 8),)))}
    unit, call = random_copy(Masked()), masked(invented=invented)

    prove(unit, call, right, tp=2, training=True)
    with pytest.raises(Difference, match="output 0 differs"):
        prove(unit, call, dataclasses.replace(right, slices=swapped), tp=2, training=True)


def test_a_divided_weight_that_never_matters_is_not_proven() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(x) + 0 * self.a(x)

    plan = UnitPlan(copies=("a",), alone={"a": Slice.even(2, 16, 2)}, slices={"a.weight": Slice.even(0, 16, 2)})
    with pytest.raises(Difference, match=r"gradient of a\.weight vanishes whatever the data"):
        prove(random_copy(Unread()), CALL, plan, tp=2, training=True)


class Hiding(nn.Module):
    """Returns scores of which some are infinite, on one device and on ranks alike unless `odd`."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False), odd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        divided = self.up.weight.shape[0] < 8
        y = self.down(self.up(x))
        hidden = torch.ones_like(y, dtype=torch.bool).triu(2 if self.odd and divided else 1)
        return y.masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("odd", [True, False])
def test_what_is_infinite_is_so_at_the_same_places(odd: bool) -> None:
    plan = UnitPlan(
        copies=("up",),
        reduces=("down",),
        slices={"up.weight": Slice.even(0, 8, 2), "down.weight": Slice.even(1, 8, 2)},
    )
    if not odd:
        proven(plan, Hiding(odd))
        return
    with pytest.raises(Difference, match="output 0 is not finite on both sides"):
        proven(plan, Hiding(odd))
