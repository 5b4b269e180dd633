"""Experts divided among real ranks, with replicas, stages and shards: as one device."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from parallel.expert.models import (
    CHOICES,
    EXPERTS,
    SAMPLES,
    TOKENS,
    CappedMix,
    EvenMix,
    ListedMix,
    Model,
    OrderedMix,
    StackedMix,
    batch,
    weight,
)
from shardwise.errors import LayoutError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.expert.plan_experts import plan_experts
from shardwise.parallel.tensor.slices import cut
from shardwise.testing import on_ranks


class Expected:
    """One device, the whole batch at once."""

    def __init__(self, mix: type[nn.Module], samples: int) -> None:
        self.model = Model(mix)
        self.losses, self.norms = [], []
        for _ in range(2):
            self.model.zero_grad(set_to_none=True)
            loss = self.model(**batch(samples))
            loss.backward()
            self.losses.append(float(loss.detach()))
            given = [p for p in self.model.parameters() if p.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in given])))
            with torch.no_grad():
                for parameter in given:
                    parameter -= 0.1 * parameter.grad


def run(rank: int, layout: Layout, mix: type[nn.Module], samples: int = SAMPLES) -> Program:
    """Two SGD steps of a layout, each held against one device."""
    expected = Expected(mix, samples)
    replicas, count = layout.num_replicas, layout.num_micro_batches(samples)
    parts = split(batch(samples), micro_batches=count, replicas=replicas, weights=weight)
    program = assemble(Model(mix), parts[0][0].inputs, layout=layout, rank=rank)
    for step in range(2):
        for parameter in program.parameters.values():
            parameter.grad = None
        result = program.step(parts[program.place.replica], step=step)
        assert result.loss == pytest.approx(expected.losses[step], rel=1e-5)
        assert program.gradient_norm() == pytest.approx(expected.norms[step], rel=1e-5)
        assert result.experts is not None
        for layer, rows in result.experts.loads.items():
            assert sum(rows) + result.experts.dropped[layer] == samples * TOKENS * (
                EXPERTS if mix is EvenMix else CHOICES
            )
            assert (result.experts.dropped[layer] > 0) == (mix is CappedMix)
        assert result.experts.all_to_all_bytes > 0
        with torch.no_grad():
            for parameter in program.parameters.values():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    wholes = dict(expected.model.named_parameters())
    for name, parameter in program.parameters.items():
        whole = wholes[name].detach()
        for part, number in (
            (program.part_of(name), program.place.shard),
            (program.experts_of(name), rank_of(program)),
        ):
            whole = whole if part is None else cut(whole, part, number)
        torch.testing.assert_close(parameter.detach(), whole, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
    return program


def rank_of(program: Program) -> int:
    assert program.experts is not None
    return program.experts.rank


@pytest.mark.parametrize("mix", [StackedMix, ListedMix])
@on_ranks(2)
def test_two_ranks_with_half_of_the_experts_equal_one_device(rank: RankContext, mix: type[nn.Module]) -> None:
    program = run(rank.rank, Layout(ep=2), mix)
    held = {name for name in program.parameters if ".experts." in name}
    if mix is ListedMix:
        own = (0, 1) if rank.rank == 0 else (2, 3, 4)
        assert {int(name.split(".")[4]) for name in held} == set(own)
    else:
        assert all(program.parameters[name].shape[0] == (2, 3)[rank.rank] for name in held)
    program.close()


@pytest.mark.parametrize("mix", [StackedMix, ListedMix])
@pytest.mark.parametrize("text", ["ep=2,dp=2", "ep=2,pp=2", "ep=4", "ep=2,tp=2"])
@on_ranks(4, timeout_s=90)
def test_four_ranks_equal_one_device(rank: RankContext, text: str, mix: type[nn.Module]) -> None:
    program = run(rank.rank, Layout.parse(text), mix)
    owners = sum(program.owns(name) for name in program.parameters)
    assert owners > 0 or (program.place.replica >= 2 and program.place.dp == 4)
    program.close()


@pytest.mark.parametrize("mix", [StackedMix, ListedMix])
@pytest.mark.parametrize("text", ["ep=2", "ep=2,micro_batches=2"])
@on_ranks(2)
def test_a_batch_that_does_not_divide_equals_one_device(rank: RankContext, text: str, mix: type[nn.Module]) -> None:
    """Seven samples: three and four, and shapes that differ between ranks and between micro-batches."""
    run(rank.rank, Layout.parse(text), mix, samples=7).close()


@pytest.mark.parametrize("mix", [OrderedMix, EvenMix])
@on_ranks(2)
def test_rows_that_stand_in_the_order_of_their_experts_equal_one_device(
    rank: RankContext, mix: type[nn.Module]
) -> None:
    run(rank.rank, Layout(ep=2), mix, samples=7).close()


@on_ranks(2)
def test_what_a_model_drops_is_counted_and_equals_one_device(rank: RankContext) -> None:
    run(rank.rank, Layout(ep=2), CappedMix).close()


@on_ranks(2)
def test_what_one_rank_leaves_out_is_told_to_all(rank: RankContext) -> None:
    """Where tokens of a rank choose no expert of the other, both exchange none of them, and nobody waits."""
    model = Model(StackedMix)
    with torch.no_grad():
        for block in model.blocks:
            block.mix.router.weight.zero_()
            block.mix.router.bias.copy_(torch.tensor([5.0, 4.0, 0.0, 0.0, 0.0]))  # all of them: experts 0 and 1
    parts = split(batch(), micro_batches=1, replicas=2, weights=weight)
    program = assemble(model, parts[0][0].inputs, layout=Layout(ep=2), rank=rank.rank)
    result = program.step(parts[rank.rank], step=0)
    assert result.experts is not None
    assert result.experts.loads["blocks.0.mix.experts"] == (48, 48, 0, 0, 0)
    assert result.experts.imbalance == pytest.approx(2.5)
    assert all(parameter.grad is not None for parameter in program.parameters.values())
    if rank.rank == 1:
        assert all(float(program.parameters[f"blocks.0.mix.experts.{n}"].grad.abs().max()) == 0 for n in ("up", "down"))
    program.close()


@on_ranks(2)
def test_a_plan_of_another_layout_is_refused(rank: RankContext) -> None:
    plan = plan_experts(Model(StackedMix), batch(), ep=3)
    with pytest.raises(LayoutError, match="made for ep=3 and the layout has ep=2"):
        assemble(Model(StackedMix), batch(), layout=Layout(ep=2), rank=rank.rank, experts=plan)
