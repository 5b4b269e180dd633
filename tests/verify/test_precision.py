"""Layouts that compute in 16 bits are one device that does; float16 skips overflowing steps on all ranks alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.program import Program
from shardwise.launch import RankContext, RankStarter
from shardwise.layout import Layout, Precision, Techniques
from shardwise.testing import on_ranks
from shardwise.verify import verify

BFLOAT16 = Precision(compute="bfloat16")
FLOAT16 = Precision(compute="float16", loss_scale=1024.0)
EMULATED = Precision(compute="bfloat16", emulate=True)
EMULATED_FLOAT16 = Precision(compute="float16", emulate=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class _Louder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, times: float) -> torch.Tensor:
        ctx.times = times
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.times, None


def _louder(x: torch.Tensor, times: float) -> torch.Tensor:
    out: torch.Tensor = _Louder.apply(x, times)  # type: ignore[no-untyped-call]
    return out


class LoudBlock(Block):
    """Its gradients are `times` as large as they should be."""

    times = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(_louder(torch.relu(self.up(self.norm(x))), self.times))
        return out


class Model(nn.Module):
    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight  # tied

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def loss_of(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())


def batch_of(samples: int = 8) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(0, 32, (samples, 6), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("layout", ["dp=2", "pp=2", "pp=2,schedule=zb-h1", "fsdp=2"])
@pytest.mark.parametrize("precision", [BFLOAT16, FLOAT16, EMULATED], ids=lambda precision: precision.label[:18])
def test_a_layout_in_16_bits_is_one_device_in_16_bits(layout: str, precision: Precision, starter: RankStarter) -> None:
    comparison = verify(
        Model,
        batch_of(),
        loss=loss_of,
        layout=layout,
        steps=3,
        techniques=Techniques(precision=precision),
        starter=starter,
    )
    assert comparison.equal, str(comparison)
    assert comparison.worst_error <= 1e-5  # the same products of the same rows: no more than float32 sums differ


def test_shards_in_16_bits_are_one_device_within_what_16_bits_leave(starter: RankStarter) -> None:
    for precision in (BFLOAT16, EMULATED_FLOAT16):
        techniques = Techniques(precision=precision)
        comparison = verify(Model, batch_of(), loss=loss_of, layout="tp=2", techniques=techniques, starter=starter)
        assert comparison.equal, str(comparison)
        assert comparison.worst_error > 1e-5  # partial sums are rounded: this is not float32


def program_of(rank: RankContext, layout: Layout, precision: Precision) -> tuple[Program, Callable[[int], float]]:
    """A program, and what takes a step of it; answers the norm of its gradients."""
    torch.manual_seed(0)
    model = Model(LoudBlock)
    parts = split(batch_of(), micro_batches=2, replicas=layout.num_replicas, weights=lambda inputs: 1.0)
    program = assemble(
        model,
        parts[0][0].inputs,
        layout=layout,
        rank=rank.rank,
        loss=loss_of,
        num_micro_batches=2,
        techniques=Techniques(precision=precision),
    )
    mine = parts[program.place.replica]

    def step(number: int) -> float:
        program.step(mine, step=number)
        return program.gradient_norm()

    return program, step


def told_by_all(value: object) -> list[object]:
    told: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize("layout", ["dp=2", "pp=2", "fsdp=2"])
@pytest.mark.parametrize("emulate", [True, False])
def test_an_overflow_on_one_rank_skips_the_step_on_all(rank: RankContext, layout: str, emulate: bool) -> None:
    precision = Precision(compute="float16", emulate=emulate, loss_scale_window=2)
    program, step = program_of(rank, Layout.parse(layout), precision)
    states = [state.parameter for state in program.states.values()]
    optimizer = torch.optim.AdamW(states, lr=1e-2)
    decisions: list[bool] = []
    scales: list[float] = []
    changed: list[bool] = []
    for number in range(4):
        loud = number == 1 and rank.rank == 0  # gradients beyond float16, on one rank alone
        vars(program.model.get_submodule("layers.0"))["times"] = 1e12 if loud else 1.0
        norm = step(number)
        before = [state.detach().clone() for state in states]
        accepted = program.accepts(norm)
        if accepted:
            optimizer.step()
        program.updated()
        optimizer.zero_grad()
        decisions.append(accepted)
        scales.append(program.numerics.scale)
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, states, strict=True)))
    assert decisions == [True, False, True, True]
    assert changed == decisions
    assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**16]
    assert told_by_all((decisions, scales)) == [(decisions, scales)] * 2
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}  # a skipped step is no update
    program.close()


@on_ranks(2, timeout_s=60.0)
def test_the_scale_does_not_show_in_gradients(rank: RankContext) -> None:
    norms = []
    for scale in (1.0, 2.0**10):
        program, step = program_of(rank, Layout.parse("pp=2"), Precision(compute="float16", loss_scale=scale))
        norms.append(step(0))
        program.close()
    assert math.isclose(norms[0], norms[1], rel_tol=1e-3)


@on_ranks(2, timeout_s=60.0)
def test_deterministic_steps_give_the_same_bits_twice(rank: RankContext) -> None:
    runs = []
    for _ in range(2):
        program, step = program_of(rank, Layout.parse("dp=2"), Precision(deterministic=True))
        norm = step(0)
        runs.append((norm, {name: p.grad for name, p in program.parameters.items()}))
        assert not torch.are_deterministic_algorithms_enabled()
        program.close()
    assert runs[0][0] == runs[1][0]
    for name, gradient in runs[0][1].items():
        again = runs[1][1][name]
        assert gradient is not None
        assert again is not None
        assert torch.equal(gradient, again)
