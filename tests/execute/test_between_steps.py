"""What a step leaves to the next: gradients that somebody holds stay, those in `.grad` are added to, and a step that
ends in an error leaves nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sharded_side import Decoder, batch_of
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.program import Program
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Layout, Precision, Techniques
from shardwise.testing import on_ranks

LAYOUTS = ["dp=2", "fsdp=2,zero=1", "fsdp=2,zero=2", "fsdp=2,zero=3", "fsdp=2,zero=3,unshard=step"]


class Failing(torch.autograd.Function):
    """Nothing, until its backward is to fail: in so many calls, none where it is 0."""

    calls_left = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        Failing.calls_left -= 1
        if Failing.calls_left == 0:
            raise ValueError("this backward fails")
        return gradients[0]


def laid_out(rank: int, layout: str) -> tuple[Program, list[MicroBatch]]:
    torch.manual_seed(0)
    model = Decoder().double()
    model.blocks[2].register_forward_hook(lambda module, args, out: Failing.apply(out))
    parts = split(batch_of(), micro_batches=2, replicas=2, weights=weigher(model))
    program = assemble(model, parts[0][0].inputs, layout=Layout.parse(layout), rank=rank, num_micro_batches=2)
    return program, list(parts[program.place.replica])


def forget_gradients(program: Program) -> None:
    for parameter in (*program.parameters.values(), *(state.parameter for state in program.states.values())):
        parameter.grad = None


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failed_step_leaves_nothing_to_the_next(rank: RankContext, layout: str) -> None:
    program, own = laid_out(rank.rank, layout)
    Failing.calls_left = 0
    program.step(own, step=0)
    wanted = {name: None if g is None else g.clone() for name, g in program.gradients()}
    forget_gradients(program)
    Failing.calls_left = 2  # in the last micro-batch, of which some gradients are on their way
    with pytest.raises(ValueError, match="this backward fails"):
        program.step(own, step=0)
    forget_gradients(program)
    program.step(own, step=0)
    for name, gradient in program.gradients():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-15, msg=name)
    program.close()


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_an_earlier_step_stay_as_they_are(rank: RankContext, layout: str) -> None:
    program, own = laid_out(rank.rank, layout)
    Failing.calls_left = 0
    program.step(own, step=0)
    held = [state.parameter.grad for state in program.states.values() if state.parameter.grad is not None]
    values = [gradient.clone() for gradient in held]
    forget_gradients(program)
    with torch.no_grad():
        for state in program.states.values():
            state.parameter.mul_(1.5)
    program.updated()
    program.step(own, step=1)
    assert all(torch.equal(gradient, value) for gradient, value in zip(held, values, strict=True))
    program.close()


@on_ranks(2, timeout_s=60.0)
def test_one_rank_keeps_the_gradients_of_many_steps(rank: RankContext) -> None:
    torch.manual_seed(0)
    model = Decoder(width=64)
    parts = split(batch_of(), micro_batches=1, replicas=2, weights=weigher(model))
    program = assemble(model, parts[0][0].inputs, layout=Layout.parse("dp=2"), rank=rank.rank)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(7):
        program.step(parts[program.place.replica], step=step)
        found = [p.grad for p in program.parameters.values() if p.grad is not None]
        if rank.rank == 0:
            kept += [(gradient, gradient.clone()) for gradient in found]
        forget_gradients(program)
        with torch.no_grad():
            for parameter in program.parameters.values():
                parameter.mul_(1.05)
    assert all(torch.equal(gradient, value) for gradient, value in kept)
    program.close()


def test_scaled_gradients_are_added_to_those_of_the_step_before() -> None:
    torch.manual_seed(0)
    model = Decoder()
    parts = split(batch_of(), micro_batches=1, replicas=1, weights=weigher(model))
    techniques = Techniques(precision=Precision(compute="float16", emulate=True))
    program = assemble(model, parts[0][0].inputs, layout=Layout(), rank=0, techniques=techniques)
    program.step(parts[0], step=0)
    once = {name: gradient.clone() for name, gradient in program.gradients() if gradient is not None}
    program.step(parts[0], step=0)
    for name, gradient in program.gradients():
        assert gradient is None or torch.equal(gradient, 2 * once[name])
    program.close()
