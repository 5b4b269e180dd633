"""Experts are found by structure and calls, proven, and what cannot be divided is refused with a reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn
import transformers as hf

from parallel.expert.models import (
    CappedMix,
    DenseMix,
    DroppingMix,
    EvenMix,
    IdentityBeyond,
    LayersInARow,
    ListedMix,
    Model,
    OneIsNeverChosen,
    OrderedMix,
    Regularised,
    StackedMix,
    batch,
)
from shardwise.describe.expert import Listed, Ordered, Stacked, runs_of_experts
from shardwise.errors import LayoutError
from shardwise.parallel.expert import dispatch
from shardwise.parallel.expert.plan_experts import plan_experts


def test_stacked_experts_are_found_by_how_they_are_called() -> None:
    plan = plan_experts(Model(StackedMix), batch(), ep=2)
    assert list(plan.units) == [f"blocks.{i}" for i in range(4)]
    assert plan.units["blocks.0"] == (
        Stacked(
            module="mix.experts",
            num_experts=5,
            parameters=("up", "down", "bias"),
            rows="tokens",
            index="chosen",
            weights="gates",
            attributes=("count",),
        ),
    )
    assert "5 experts of 4 layers divided among 2 ranks, 2 to 3 on each" in plan.lines()[0]


def test_experts_in_a_list_are_found_and_a_shared_expert_is_not_one_of_them() -> None:
    plan = plan_experts(Model(ListedMix), batch(), ep=2)
    members = tuple(f"mix.experts.{i}" for i in range(5))
    assert plan.units["blocks.1"] == (Listed(module="mix.experts", members=members, caller="mix"),)
    assert plan.owners()["blocks.1.mix.experts.1"] == 0
    assert plan.owners()["blocks.1.mix.experts.2"] == 1


def test_experts_that_are_given_rows_in_their_order_are_found() -> None:
    counted, even = (plan_experts(Model(mix), batch(), ep=2).units["blocks.0"] for mix in (OrderedMix, EvenMix))
    assert [each.module for each in counted] == ["mix.up", "mix.down"]
    assert counted[0] == Ordered(
        module="mix.up", num_experts=5, parameters=("matrix",), rows="rows", counts="counts", attributes=("count",)
    )
    assert even == (Ordered(module="mix.experts", num_experts=5, parameters=("matrix",), rows="rows"),)


def test_a_slice_has_its_experts_of_every_stacked_parameter() -> None:
    plan = plan_experts(Model(StackedMix), batch(), ep=3)
    assert plan.slices()["blocks.0.mix.experts.bias"].ranges == (((0, 1),), ((1, 3),), ((3, 5),))
    assert runs_of_experts(5, 3) == ((0, 1), (1, 3), (3, 5))


@pytest.mark.parametrize("mix", [LayersInARow, nn.Identity])
def test_a_model_without_experts_is_refused(mix: type[nn.Module]) -> None:
    with pytest.raises(LayoutError, match=r"ep=2 divides the experts .* Model has none .*; use dp=2 instead of ep=2"):
        plan_experts(Model(mix), batch(), ep=2)


def test_experts_that_every_token_visits_are_refused_with_what_they_are_called_with() -> None:
    with pytest.raises(LayoutError, match=r"mix: its 5 experts are called with x \(\d, 6, 8\), and not with rows"):
        plan_experts(Model(DenseMix), batch(), ep=2)


def test_more_ranks_than_experts_are_refused() -> None:
    with pytest.raises(LayoutError, match="there are 5 experts and ep=6; use ep=5 or less"):
        plan_experts(Model(StackedMix), batch(), ep=6)


def test_random_numbers_inside_experts_are_not_divided() -> None:
    with pytest.raises(LayoutError, match="not proven: "):
        plan_experts(Model(DroppingMix), batch(), ep=2)


def test_a_dispatch_that_loses_gradients_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = dispatch._Send.backward

    def lossy(ctx: object, *gradients: torch.Tensor) -> object:
        tie, *rest = sound(ctx, *gradients)
        return (tie, *[each * 0.5 if isinstance(each, torch.Tensor) else each for each in rest])

    monkeypatch.setattr(dispatch._Send, "backward", staticmethod(lossy))
    with pytest.raises(LayoutError, match="gradient of .* differs"):
        plan_experts(Model(StackedMix), batch(), ep=2)


def test_weights_that_are_swapped_with_another_choice_are_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.expert import stacked

    sound = stacked.send_to

    def swapped(tensors, *rest):  # type: ignore[no-untyped-def]
        rows, weights, choice = tensors
        return sound([rows, weights.flip(1), choice], *rest)

    monkeypatch.setattr(stacked, "send_to", swapped)
    with pytest.raises(LayoutError, match="differs"):
        plan_experts(Model(StackedMix), batch(), ep=2)


def test_an_expert_that_the_router_never_chooses_is_proven_too() -> None:
    with pytest.raises(LayoutError, match="choices dealt out in turn, one of no expert: .* differs"):
        plan_experts(Model(OneIsNeverChosen), batch(), ep=2)


def test_choices_that_no_expert_takes_are_dropped_where_the_module_drops_them() -> None:
    assert plan_experts(Model(CappedMix), batch(), ep=2).units
    with pytest.raises(LayoutError, match="one of no expert: output 0 on rank . differs"):
        plan_experts(Model(IdentityBeyond), batch(), ep=2)


def test_experts_whose_weights_are_read_outside_stay_whole() -> None:
    plan = plan_experts(Regularised(), batch(), ep=2)
    assert list(plan.units) == ["blocks.1", "blocks.2", "blocks.3"]
    assert plan.reasons == {
        "blocks.0": "mix.experts: its up is read outside of the unit too, where a part is not enough"
    }


def test_a_block_too_large_to_be_proven_is_proven_in_two_narrow_instances() -> None:
    config = hf.MixtralConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
        use_cache=False,
    )
    model = hf.MixtralForCausalLM(config)
    ids = torch.arange(64).view(4, 16)
    plan = plan_experts(model, {"input_ids": ids, "labels": ids}, ep=2, proof_bytes=2**24)
    whole = plan_experts(model, {"input_ids": ids, "labels": ids}, ep=2)
    assert "two narrow instances" in plan.proof
    assert "narrow" not in whole.proof
    assert plan.units == whole.units
    assert plan.units["model.layers.1"][0].num_experts == 16


def test_a_plan_is_a_value() -> None:
    plan = plan_experts(Model(StackedMix), batch(), ep=2)
    assert dataclasses.replace(plan, ep=2) == plan
