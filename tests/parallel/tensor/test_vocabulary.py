"""Tables divided by rows and heads by columns: proven, tied ones one tensor, whole where somebody needs them whole."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers as hf

from shardwise.describe.tensor import TensorPlan, UnitPlan
from shardwise.errors import ModelError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.tensor.check_plan import check_plan
from shardwise.parallel.tensor.divided import Divided
from shardwise.parallel.tensor.instance import Call, random_copy
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.prove import Difference, prove
from shardwise.parallel.tensor.slices import cut, spread
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads
from shardwise.testing import on_ranks

IDS = torch.tensor([[0, 12, 3, 4, 7], [6, 6, 9, 1, 3]])
VOCABULARY = 13
TEXT = {"input_ids": torch.arange(2, 22).view(2, 10), "labels": torch.arange(2, 22).view(2, 10)}


class Reader(nn.Module):
    """Embedding, two blocks, head; tied where asked."""

    def __init__(
        self, *, tied: bool = False, vocabulary: int = VOCABULARY, width: int = 8, table: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = table or nn.Embedding(vocabulary, width, padding_idx=3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def planned(model: nn.Module, tp: int = 2, batch: Any = (IDS,)) -> TensorPlan:
    return plan_tensor(model, batch, tp=tp)


# -- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_an_odd_vocabulary_is_divided_at_both_ends(tp: int) -> None:
    plan = planned(Reader(), tp)
    embed, head = plan.units["embed"], plan.units["head"]

    assert embed.slices == {"weight": spread(0, VOCABULARY, tp)}
    assert head.slices == {"weight": spread(0, VOCABULARY, tp), "bias": spread(0, VOCABULARY, tp)}
    assert head.joins == {"": spread(-1, VOCABULARY, tp)}
    assert embed.attributes["", "padding_idx"].count(None) == tp - 1
    assert "error" in str(embed.proof)
    assert "error" in str(head.proof)
    assert not {"embed", "head"} & plan.reasons.keys()


def test_fewer_words_than_ranks_stay_whole() -> None:
    plan = planned(Reader(vocabulary=5, width=4, table=nn.Embedding(5, 4)), 8, (IDS % 5,))

    assert not {"embed", "head"} & plan.units.keys()
    assert plan.reasons["head"] == "it has 5 rows for 8 ranks"


def test_a_tied_tensor_is_divided_alike_under_all_of_its_names() -> None:
    plan = planned(Reader(tied=True))

    assert plan.slice_of("embed.weight") == plan.slice_of("head.weight") == spread(0, VOCABULARY, 2)


def test_a_table_that_the_models_own_code_reads_stays_whole() -> None:
    class Functional(Reader):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.linear(self.embed(ids), self.embed.weight).square().mean()

    plan = planned(Functional())
    assert "embed" not in plan.units
    assert plan.reasons["embed"] == "embed.weight is read by code outside of its unit"


class Shifted(nn.Embedding):
    """Positions counted from two, as in BART: what it is given are no ids of its rows."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids // 2 + 2)


def test_what_is_not_proven_takes_along_what_it_is_tied_to() -> None:
    plan = planned(Reader(tied=True, table=Shifted(VOCABULARY, 8)))

    assert not {"embed", "head"} & plan.units.keys()
    assert "not proven" in plan.reasons["embed"]
    assert plan.reasons["head"] == "its weight is tied to embed.weight, which stays whole"


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_tables_that_look_at_all_ids_at_once_stay_whole(setting: dict[str, Any]) -> None:
    assert "embed" not in planned(Reader(table=nn.Embedding(VOCABULARY, 8, **setting))).units


def test_a_table_of_more_columns_than_rows_is_no_vocabulary() -> None:
    assert "embed" not in planned(Reader(vocabulary=7, table=nn.Embedding(7, 8)), 2, (IDS % 7,)).units


@pytest.mark.filterwarnings("ignore")
def test_a_bias_with_two_names_is_divided_under_both() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    plan = planned(hf.BertForMaskedLM(hf.BertConfig(vocab_size=99, **sizes)), 2, TEXT)

    assert plan.slice_of("cls.predictions.bias") == plan.slice_of("cls.predictions.decoder.bias") == spread(0, 99, 2)
    assert plan.slice_of("bert.embeddings.word_embeddings.weight") == spread(0, 99, 2)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_unit_that_is_never_called_is_divided_like_the_others() -> None:
    config = hf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    plan = planned(hf.T5ForConditionalGeneration(config), 2, TEXT)

    assert plan.slice_of("shared.weight") == plan.slice_of("encoder.embed_tokens.weight") == spread(0, 99, 2)


# -- proofs -------------------------------------------------------------------------------------


def table_plan(tp: int = 2) -> UnitPlan:
    return UnitPlan(
        lookups=("",), slices={"weight": spread(0, 13, tp)}, attributes={("", "padding_idx"): (3, None)[:tp]}
    )


def proven(unit: nn.Module, plan: UnitPlan, call: Call) -> float:
    return prove(random_copy(unit), call, plan, tp=2, training=True)[1]


TABLE = nn.Embedding(13, 4, padding_idx=3)
LOOKUP = Call(args=(IDS,), kwargs={}, requires_grad=frozenset())
HEAD = nn.Linear(4, 13)
PRODUCT = Call(args=(torch.randn(2, 3, 4),), kwargs={}, requires_grad=frozenset({0}))
HEAD_PLAN = UnitPlan(
    copies=("",), joins={"": spread(-1, 13, 2)}, slices={name: spread(0, 13, 2) for name in ("weight", "bias")}
)


def test_plans_written_by_hand_are_proven() -> None:
    assert proven(TABLE, table_plan(), LOOKUP) < 1e-12
    assert proven(HEAD, HEAD_PLAN, PRODUCT) < 1e-12


def test_a_padding_row_that_gets_a_gradient_is_refused() -> None:
    wrong = dataclasses.replace(table_plan(), attributes={("", "padding_idx"): (None, None)})
    with pytest.raises(Difference, match="gradient of weight differs"):
        proven(TABLE, wrong, LOOKUP)


def test_a_head_whose_input_gradient_is_not_summed_is_refused() -> None:
    with pytest.raises(Difference, match="gradient of argument 0 differs"):
        proven(HEAD, dataclasses.replace(HEAD_PLAN, copies=()), PRODUCT)


def test_columns_in_another_order_are_refused() -> None:
    part = spread(0, 12, 2)
    swapped = dataclasses.replace(part, dim=-1, ranges=part.ranges[::-1])
    wrong = UnitPlan(copies=("",), joins={"": swapped}, slices={"weight": part, "bias": part})
    with pytest.raises(Difference, match="output 0 differs"):
        proven(nn.Linear(4, 12), wrong, PRODUCT)


# -- tied, on ranks -----------------------------------------------------------------------------


def test_code_that_asks_a_divided_table_for_its_rows_is_told_all_of_them() -> None:
    model = Reader()
    plan = planned(model)

    def rows(group: ThreadGroup) -> tuple[int, int]:
        own = copy.deepcopy(model)
        Divided(own, plan, group, list(plan.units))
        return own.embed.num_embeddings, own.embed.weight.shape[0]

    assert on_threads(2, rows) == [(VOCABULARY, 6), (VOCABULARY, 7)]


def test_a_tie_stays_one_parameter_also_where_the_units_are_shown_whole() -> None:
    model, plan = Reader(tied=True), planned(Reader(tied=True))
    whole = model.embed.weight.detach().clone()

    def work(group: ThreadGroup) -> None:
        own = copy.deepcopy(model)
        divided = Divided(own, plan, group, list(plan.units))
        assert own.head.weight is own.embed.weight
        assert torch.equal(own.head.weight, cut(whole, spread(0, VOCABULARY, 2), group.rank))
        local = own.head.weight
        with divided.off():
            assert own.head.weight is own.embed.weight
            assert own.head.weight.shape == whole.shape
        assert own.head.weight is own.embed.weight is local

    on_threads(2, work)


def assert_equal_to_one_device(rank: RankContext, layout: Layout, **settings: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, settings.get("vocabulary", VOCABULARY), (4, 5), generator=generator)
    whole = Reader(**settings)
    expected = whole(ids)
    expected.backward()

    parts = split({"ids": ids}, micro_batches=layout.num_micro_batches(4), replicas=1, weights=lambda _: 1.0)
    program = assemble(Reader(**settings), parts[0][0].inputs, layout=layout, rank=rank.rank)
    for step in range(2):  # the second adds to gradients that are there
        for parameter in program.parameters.values():
            parameter.grad = None
        assert program.step(parts[0], step=step).loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert program.gradient_norm() == pytest.approx(
        float(nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])), rel=1e-5
    )
    assert (program.part_of("embed.weight") is None) == (layout.tp == 1)
    for name, parameter in program.parameters.items():
        part, wanted = program.part_of(name), whole.get_parameter(name).grad
        assert wanted is not None
        assert parameter.grad is not None, name
        mine = wanted if part is None else cut(wanted, part, program.place.shard)
        # float32: sums over shards and micro-batches in another order
        torch.testing.assert_close(parameter.grad, mine, rtol=2e-4, atol=2e-6, msg=name)
    program.close()


@on_ranks(2)
@pytest.mark.parametrize("tied", [True, False])
def test_shards_of_a_vocabulary(rank: RankContext, tied: bool) -> None:
    assert_equal_to_one_device(rank, Layout(tp=2), tied=tied)


@on_ranks(4)
def test_a_tie_between_the_first_and_the_last_stage(rank: RankContext) -> None:
    assert_equal_to_one_device(rank, Layout(tp=2, pp=2, micro_batches=2), tied=True)


@on_ranks(4)
def test_a_large_tied_vocabulary_whose_gradients_are_summed_in_place(rank: RankContext) -> None:
    assert_equal_to_one_device(rank, Layout(tp=4, micro_batches=2), tied=True, vocabulary=4099, width=32)


# -- given plans --------------------------------------------------------------------------------


def test_a_found_plan_of_a_tied_model_is_also_one_that_may_be_given() -> None:
    model = Reader(tied=True)
    plan = planned(model)

    assert check_plan(model, (IDS,), plan).slice_of("head.weight") == plan.slice_of("embed.weight")


def test_a_given_plan_that_divides_one_end_of_a_tie_is_refused() -> None:
    model = Reader(tied=True)
    plan = planned(model)
    one_end = dataclasses.replace(plan, units={"embed": plan.units["embed"]})

    with pytest.raises(ModelError, match="embed.weight is tied to head.weight, and the plan divides them differently"):
        check_plan(model, (IDS,), one_end)
