"""Divided units against themselves whole, on the ranks that will train: equal where the plan is right, else refused."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as hf

import shardwise.parallel.tensor.start_up as start_up
from parallel.tensor.blocks import Block, Model, call_of, hand_plan
from shardwise.describe.proof import Proof
from shardwise.describe.tensor import SequenceParallel, Slice, TensorPlan, UnitPlan
from shardwise.errors import ModelError
from shardwise.execute.assemble import assemble
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.tensor.calls import kinds_of
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.start_up import calls_at_start_up, prove_on_ranks
from shardwise.parallel.tensor.threads import on_threads
from shardwise.testing import on_ranks

CALL = call_of(1, 3, 16)


def proven_here(block: nn.Module, plan: UnitPlan) -> list[dict[str, float]]:
    def rank(group: TensorGroup) -> dict[str, float]:
        module = copy.deepcopy(block)
        sharding = shard_unit(module, plan, group)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        errors = prove_on_ranks({"block": sharding}, {"block": CALL}, group)
        assert all(torch.equal(before[name], p) and p.grad is None for name, p in module.named_parameters())
        return errors

    return on_threads(2, rank)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_right_plan_is_equal_to_the_unit_whole(dtype: torch.dtype, most: float) -> None:
    errors = proven_here(Block(dropout=0.1).to(dtype).eval(), hand_plan())

    assert errors[0] == errors[1]
    assert 0.0 < errors[0]["block"] < most


def test_tensors_gathered_module_by_module_tell_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 16 * 64 * 8 + 64 * 8  # gate_up
    monkeypatch.setattr(start_up, "_free", lambda local: 6 * largest)
    gathered: list[bool] = []
    made = start_up._Gathering.__init__

    def noted(self: Any, *args: Any, at_once: bool) -> None:
        gathered.append(at_once)
        made(self, *args, at_once=at_once)

    monkeypatch.setattr(start_up._Gathering, "__init__", noted)
    errors = proven_here(Block().double(), hand_plan())

    assert gathered == [False, False]
    assert errors[0]["block"] < 1e-12


def test_units_of_which_one_module_does_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_up, "_free", lambda local: 1000)
    assert proven_here(Block(), hand_plan()) == [{}, {}]


def test_a_gradient_that_is_not_summed_is_refused_on_all_ranks_by_its_name() -> None:
    plan = dataclasses.replace(hand_plan(), partial=frozenset({"attention.norm.weight"}))

    with pytest.raises(ModelError, match=r"the plan of block .* gradient of attention.norm.bias differs"):
        proven_here(Block().double(), plan)


def test_a_row_that_is_not_summed_is_refused_by_the_output() -> None:
    plan = dataclasses.replace(hand_plan(), reduces=("attention.o",))

    with pytest.raises(ModelError, match=r"the plan of block .* output 0 differs"):
        proven_here(Block(), plan)


class Overflowing(nn.Module):
    """Whose divided run, and that alone, is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.width = nn.Linear(16, 16), 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if y.shape[-1] == self.width else y * float("nan")


def test_what_is_no_number_is_not_equal() -> None:
    cut = {"layer.weight": Slice.even(0, 16, 2), "layer.bias": Slice.even(0, 16, 2)}
    plan = UnitPlan(copies=("layer",), slices=cut, outputs={0: Slice.even(2, 16, 2)})

    with pytest.raises(ModelError, match=r"output 0 differs, in its shape, or in where it is a finite number"):
        proven_here(Overflowing(), plan)


class Nothing(nn.Module):
    """Whose run is no number, divided or whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * float("nan")


def test_where_nothing_is_a_number_nothing_is_proven() -> None:
    plan = UnitPlan(reduces=("layer",), slices={"layer.weight": Slice.even(1, 16, 2)})

    with pytest.raises(ModelError, match=r"output 0 differs"):
        proven_here(Nothing(), dataclasses.replace(plan, cuts={"layer": Slice.even(-1, 16, 2)}))


@pytest.mark.parametrize("sequence", [SequenceParallel.OFF, SequenceParallel.ON])
def test_a_plan_found_in_narrow_instances_holds_on_the_ranks(sequence: SequenceParallel) -> None:
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8
    )
    model, tokens = hf.LlamaForCausalLM(config), torch.arange(2, 24).view(2, 11)
    text = {"input_ids": tokens, "labels": tokens}
    plan = plan_tensor(model, text, tp=2, sequence=sequence, proof_bytes=1)
    calls = calls_at_start_up(kinds_of(model, text), plan)

    def rank(group: TensorGroup) -> dict[str, float]:
        unit = copy.deepcopy(model.get_submodule("model.layers.0"))
        sharding = shard_unit(unit, plan.units["model.layers.0"], group)
        return prove_on_ranks({"model.layers.0": sharding}, calls, group)

    assert plan.deals_tokens == bool(sequence)
    assert list(calls) == ["model.layers.0"]
    assert 0.0 < on_threads(2, rank)[0]["model.layers.0"] < 1e-5


def planned(plan: UnitPlan) -> TensorPlan:
    again = dataclasses.replace(plan, proof=Proof(tp=2, on="a narrow instance", start_up=True))
    return TensorPlan(tp=2, units={"blocks.0": again, "blocks.1": again}, reasons={}, sharded_share=1.0)


@on_ranks(2)
def test_a_program_whose_proof_was_narrow_proves_one_unit_of_each_kind_before_its_first_step(rank: RankContext) -> None:
    torch.manual_seed(0)
    model, x = Model(Block(), Block()), (torch.randn(2, 3, 16),)
    program = assemble(model, x, layout=Layout(tp=2), rank=rank.rank, tensor=planned(hand_plan()))

    assert program.divided is not None
    assert list(program.divided.start_up_errors) == ["blocks.0"]
    assert 0.0 < program.divided.start_up_errors["blocks.0"] < 1e-5
    program.close()


@on_ranks(2)
def test_a_program_with_a_wrong_plan_is_refused_by_its_ranks(rank: RankContext) -> None:
    wrong = planned(dataclasses.replace(hand_plan(), partial=frozenset({"attention.norm.weight"})))

    with pytest.raises(ModelError, match=r"plan of blocks.0 .* gradient of attention.norm.bias differs"):
        assemble(Model(Block()), (torch.randn(2, 3, 16),), layout=Layout(tp=2), rank=rank.rank, tensor=wrong)
