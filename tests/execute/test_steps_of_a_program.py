"""Several steps of a program beside plain torch: what is in `.grad` is added to, and a given schedule is proven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.errors import LayoutError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.plan.sources import GivenSource
from shardwise.schedule import generate
from shardwise.testing import on_ranks

SAMPLES, WIDTH = 8, 16
BATCH = {"x": torch.linspace(-1, 1, SAMPLES * WIDTH).view(SAMPLES, WIDTH).sin()}


class Model(nn.Module):
    """Four blocks; the first and the last share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(4)
        )
        self.blocks[3][0].weight = self.blocks[0][0].weight  # type: ignore[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.mse_loss(x, torch.zeros_like(x))


class OwnCheckpoint(torch.autograd.Function):
    """A checkpoint of the user's own: its backward calls `backward`."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            out: torch.Tensor = layer(x)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        torch.autograd.backward(y, gradients[0])
        return None, x.grad


class Twice(nn.Module):
    """One layer twice, each time behind a checkpoint of its own where `checkpoints` says so."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.checkpoints = checkpoints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + (OwnCheckpoint.apply(self.layer, x) if self.checkpoints else self.layer(x))  # type: ignore[no-untyped-call]
        return x


class Checkpointed(nn.Module):
    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Twice(checkpoints) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, torch.zeros_like(x))


class Counting(Model):
    """Draws random numbers, and counts its forwards in a buffer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return super().forward(F.dropout(x, 0.1, self.training))


def assert_gradients(program: Program, *, steps: int, plain: Callable[[], nn.Module] = Model) -> None:
    model = plain()
    for _ in range(steps):
        model(**BATCH).backward()
    wanted = dict(model.named_parameters())
    for name, parameter in program.parameters.items():
        own, whole = parameter.grad, wanted[name].grad
        assert own is not None
        assert whole is not None
        assert float((own - whole).norm() / whole.norm()) < 1e-5, name


def check_two_steps(rank: RankContext, layout: Layout) -> None:
    num = layout.num_micro_batches(SAMPLES)
    parts = split(BATCH, micro_batches=num, replicas=layout.dp, weights=lambda _: 1.0)
    program = assemble(Model(), parts[0][0].inputs, layout=layout, rank=rank.rank)
    own = parts[program.place.replica]
    for step in range(2):
        program.step(own, step=step)
        program.evaluate(own)  # leaves gradients alone
        assert_gradients(program, steps=step + 1)
    program.close()


@on_ranks(2)
def test_replicas_add_a_step_to_the_one_before_whose_gradients_are_summed_already(rank: RankContext) -> None:
    check_two_steps(rank, Layout(dp=2))


@on_ranks(2)
def test_stages_that_share_a_weight_add_a_step_to_the_one_before(rank: RankContext) -> None:
    check_two_steps(rank, Layout(pp=2, micro_batches=2))
    check_two_steps(rank, Layout(pp=2, micro_batches=4, schedule="zb-v"))


@on_ranks(2)
def test_a_buffer_that_code_between_units_writes_is_written_by_every_replica(rank: RankContext) -> None:
    parts = split(BATCH, micro_batches=1, replicas=2, weights=lambda _: 1.0)
    model = Counting()
    program = assemble(model, parts[0][0].inputs, layout=Layout(dp=2), rank=rank.rank)
    for step in range(3):
        program.step(parts[program.place.replica], step=step)
    assert int(model.forwards) == 3
    program.close()


@on_ranks(2)
def test_replicas_sum_what_a_backward_inside_the_backward_has_added(rank: RankContext) -> None:
    parts = split(BATCH, micro_batches=1, replicas=2, weights=lambda _: 1.0)
    program = assemble(Checkpointed(True), parts[0][0].inputs, layout=Layout(dp=2), rank=rank.rank)
    program.step(parts[program.place.replica], step=0)
    assert_gradients(program, steps=1, plain=lambda: Checkpointed(False))
    program.close()


@on_ranks(2)
def test_a_parameter_that_was_frozen_when_the_model_was_laid_out_is_not_trained_without_its_sum(
    rank: RankContext,
) -> None:
    parts = split(BATCH, micro_batches=1, replicas=2, weights=lambda _: 1.0)
    model = Model()
    frozen = model.get_parameter("blocks.1.0.weight").requires_grad_(False)
    program = assemble(model, parts[0][0].inputs, layout=Layout(dp=2), rank=rank.rank)
    program.step(parts[program.place.replica], step=0)
    assert frozen.grad is None
    program.parameters["blocks.1.0.weight"].requires_grad_()
    with pytest.raises(LayoutError, match="blocks.1.0.weight were frozen then"):
        program.step(parts[program.place.replica], step=1)
    program.close()


@on_ranks(2)
def test_a_given_schedule_that_splits_is_proven_whatever_its_number_of_micro_batches(rank: RankContext) -> None:
    given = GivenSource(schedule=generate("zb-h1", num_ranks=2, num_micro_batches=8))  # not 2 * pp
    (parts,) = split(BATCH, micro_batches=8, replicas=1, weights=lambda _: 1.0)
    program = assemble(Model(), parts[0].inputs, layout=Layout(pp=2), rank=rank.rank, schedule=given)
    assert program.split_proofs
    assert not any(proof.why for proof in program.split_proofs)
    program.step(parts, step=0)
    assert_gradients(program, steps=1)
    program.close()
