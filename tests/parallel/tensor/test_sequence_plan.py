"""Units that work on a rank's tokens are found in their dataflow and proven; others are given all, and are named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import make

from parallel.tensor.blocks import Block, Model, call_of, hand_plan
from shardwise.describe.tensor import SequenceParallel, SequencePlan, Slice, TensorPlan, UnitPlan
from shardwise.parallel.context.plan_context import plan_context
from shardwise.parallel.context.ways import RING
from shardwise.parallel.tensor import prove_vocabulary
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.prove import Difference, prove

BY_TOKENS = SequencePlan(inputs=("x",), outputs=(0,))
ON_TOKENS = {"before.weight", "before.bias", "between.weight", "between.bias", "attention.o.bias", "down.bias"}


class TokenMixing(nn.Module):
    """A divided MLP, behind a convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.over_tokens = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.over_tokens(x.transpose(1, 2)).transpose(1, 2)
        return (x + self.down(F.gelu(self.up(x)))).roll(1, 1)


class Words(nn.Module):
    """A table, blocks, a norm and a head."""

    def __init__(self, *blocks: nn.Module, tied_norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 40)
        if tied_norm:
            self.scale = self.norm.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.embed(ids))
        if hasattr(self, "scale"):
            x = x * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).logsumexp(-1).mean()


def planned(model: nn.Module, tokens: int = 6) -> TensorPlan:
    ids = torch.randint(0, 40, (2, tokens), generator=torch.Generator().manual_seed(0))
    return plan_tensor(model, (ids,), tp=2, sequence=SequenceParallel.ON)


class Feed(nn.Module):
    """The second half of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.between, self.gate_up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def test_one_token_among_two_ranks_is_equal() -> None:  # (of one token, queries and keys are nothing to attention)
    names = ("gate_up.weight", "gate_up.bias", "down.weight")
    slices = {name: part for name, part in hand_plan().slices.items() if name in names}
    plan = UnitPlan(copies=("gate_up",), reduces=("down",), slices=slices, sequence=BY_TOKENS)
    found, error = prove(random_copy(Feed()), call_of(2, 1, 16), plan, tp=2, training=True, complete=True)
    assert error < 1e-12
    assert found.partial == {"between.weight", "between.bias", "down.bias"}


def test_a_row_that_reads_own_tokens_of_a_whole_width_is_given_all_tokens_of_its_columns() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.down = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.before(x))

    plan = UnitPlan(
        reduces=("down",),
        cuts={"down": Slice.even(-1, 16, 2)},
        slices={"down.weight": Slice.even(1, 16, 2)},
        sequence=BY_TOKENS,
    )
    found, error = prove(random_copy(Mixed()), call_of(2, 5, 16), plan, tp=2, training=True, complete=True)
    assert error < 1e-12
    assert found.partial == {"before.weight", "before.bias", "down.bias"}  # used on own tokens


@pytest.mark.parametrize("tokens", [6, 5])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_on_tokens_is_equal_also_where_their_number_does_not_divide(tokens: int, training: bool) -> None:
    plan = dataclasses.replace(hand_plan(), sequence=BY_TOKENS)
    unit = random_copy(Block(dropout=0.1))
    found, error = prove(unit, call_of(2, tokens, 16), plan, tp=2, training=training, complete=True)
    assert error < 1e-12
    assert found.partial - plan.partial == ON_TOKENS


def test_a_plan_that_forgets_to_sum_what_works_on_tokens_is_refused_by_name() -> None:
    complete = hand_plan().partial | ON_TOKENS
    plan = dataclasses.replace(hand_plan(), sequence=BY_TOKENS, partial=complete - {"between.weight"})
    with pytest.raises(Difference, match=r"gradient of between\.weight differs"):
        prove(random_copy(Block()), call_of(2, 6, 16), plan, tp=2, training=True)


def test_a_plan_that_sums_what_works_on_all_tokens_is_refused_by_name() -> None:
    plan = dataclasses.replace(hand_plan(), partial=hand_plan().partial | {"before.weight"})
    with pytest.raises(Difference, match=r"gradient of before\.weight differs"):
        prove(random_copy(Block()), call_of(2, 6, 16), plan, tp=2, training=True)


def test_from_the_table_to_the_head_tokens_stay_dealt_out() -> None:
    plan = planned(Words(Block(dropout=0.1), Block(dropout=0.1)))
    assert {unit: each.sequence for unit, each in plan.units.items()} == {
        "embed": SequencePlan(outputs=(0,)),
        "blocks.0": BY_TOKENS,
        "blocks.1": BY_TOKENS,
        "norm": SequencePlan(inputs=("input",), outputs=(0,)),
        "head": SequencePlan(inputs=("input",)),
    }
    assert plan.units["norm"].partial == {"weight", "bias"}
    assert not plan.all_tokens
    assert "tokens dealt out among the shards in embed and 4 more" in plan.lines()


def test_a_unit_that_mixes_tokens_is_given_all_of_them_and_named_with_what_asks_for_them() -> None:
    plan = planned(Words(Block(), TokenMixing()))
    assert plan.units["blocks.0"].sequence == BY_TOKENS
    assert plan.units["blocks.1"].sequence is None
    assert "up.weight" in plan.units["blocks.1"].slices
    assert plan.all_tokens["blocks.1"].startswith("nothing that it returns is by tokens: ")
    assert "transpose" in plan.all_tokens["blocks.1"]


def test_where_no_divided_block_can_nothing_works_on_tokens() -> None:
    plan = planned(Words(TokenMixing()))
    assert not plan.deals_tokens
    assert set(plan.all_tokens) == {"blocks.0"}


def test_a_head_that_is_joined_by_itself_reads_tokens_as_columns_do() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.score = nn.ModuleList([Block()]), nn.Linear(16, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(self.blocks[0](x)).softmax(-1).square().mean()

    x = torch.randn(2, 6, 16, requires_grad=True)
    plan = plan_tensor(Scores(), (x,), tp=2, sequence=SequenceParallel.ON)
    assert "" in plan.units["score"].alone
    assert plan.units["score"].sequence == SequencePlan(inputs=("input",))


def test_a_norm_whose_weight_others_read_is_given_all_tokens() -> None:
    plan = planned(Words(Block(), tied_norm=True))
    assert "norm" not in plan.units
    assert plan.all_tokens["norm"] == "the gradient of weight would be partial here, and is whole where others use it"


def test_without_being_asked_for_nothing_works_on_tokens() -> None:
    x = torch.randn(2, 6, 16, requires_grad=True)
    assert not plan_tensor(Model(Block()), (x,), tp=2).deals_tokens
    assert plan_tensor(Model(Block()), (x,), tp=2, sequence=SequenceParallel.ON).units["blocks.0"].sequence == BY_TOKENS


def test_a_large_table_and_head_are_proven_in_few_of_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    example = make("llama")
    asked = {"tp": 2, "sequence": SequenceParallel.ON}
    whole = plan_tensor(example.model, example.batch, **asked)
    monkeypatch.setattr(prove_vocabulary, "_MOST_WHOLE", 0)
    narrow = plan_tensor(example.model, example.batch, **asked)
    for unit in ("model.embed_tokens", "lm_head"):
        own, other = (dataclasses.replace(plan.units[unit], proof=None) for plan in (whole, narrow))
        assert own == other
        assert narrow.units[unit].proof.on == "all rows, 8 columns at most"
    assert own.sequence is not None


def test_tokens_of_a_large_head_are_dealt_out_to_contexts_as_those_of_a_small_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example = make("llama")
    asked = {"cp": 2, "attention": RING, "zigzag": True}
    whole = plan_context(example.model, example.batch, **asked)
    monkeypatch.setattr(prove_vocabulary, "_MOST_WHOLE", 0)
    narrow = plan_context(example.model, example.batch, **asked)
    assert {name: dataclasses.replace(own, error=0.0) for name, own in narrow.units.items()} == {
        name: dataclasses.replace(own, error=0.0) for name, own in whole.units.items()
    }
