"""A step tells what a rank handed over, by axis: counted where it was sent, equal to what the layout must send."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.proof import Proof
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.testing import on_ranks

SAMPLES, WIDTH = 8, 16
BATCH = {"x": torch.linspace(-1, 1, SAMPLES * WIDTH).view(SAMPLES, WIDTH)}


class Model(nn.Module):
    """Four blocks of two layers, without biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH, bias=False))
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.mse_loss(x, torch.zeros_like(x))


def sent_in_a_step(rank: RankContext, layout: Layout) -> dict[str, int]:
    num = layout.num_micro_batches(SAMPLES)
    parts = split(BATCH, micro_batches=num, replicas=layout.dp, weights=lambda _: 1.0)
    program = assemble(Model(), parts[0][0].inputs, layout=layout, rank=rank.rank)
    program.step(parts[program.place.replica], step=0)  # with headers
    sent = dict(program.step(parts[program.place.replica], step=1).sent_bytes)
    program.close()
    return sent


@on_ranks(2)
def test_shards_sum_the_output_and_the_input_gradient_of_every_block(rank: RankContext) -> None:
    activations = 4 * SAMPLES * WIDTH
    sums = 4 + 3  # the first block's input has no gradient
    assert sent_in_a_step(rank, Layout(tp=2)) == {
        "tp.all_gather": 0,
        "tp.all_reduce": sums * activations,
        "tp.reduce_scatter": 0,
    }


@on_ranks(2)
def test_replicas_sum_their_gradients_and_stages_send_activations_there_and_gradients_back(rank: RankContext) -> None:
    weights = 8
    gradients = 4 * (weights * 2 * WIDTH * WIDTH + weights)  # and one flag a parameter: whether it has one
    assert sent_in_a_step(rank, Layout(dp=2)) == {"dp.all_reduce": gradients}
    assert sent_in_a_step(rank, Layout(pp=2, micro_batches=2)) == {"pp.send": 4 * SAMPLES * WIDTH}


@on_ranks(4)
def test_axes_are_told_apart(rank: RankContext) -> None:
    sent = sent_in_a_step(rank, Layout(tp=2, pp=2, micro_batches=2))
    assert sent["pp.send"] == 4 * SAMPLES * WIDTH
    blocks = 2 if rank.rank >= 2 else 1.5  # a stage's, there and back; no gradient of the model's input
    assert sent["tp.all_reduce"] == 2 * blocks * 4 * SAMPLES * WIDTH


@on_ranks(2)
def test_what_a_proof_at_start_up_sends_belongs_to_no_step(rank: RankContext) -> None:
    plan = plan_tensor(Model(), BATCH, tp=2)
    narrow = Proof(tp=2, on="a narrow instance", start_up=True)
    plan = dataclasses.replace(
        plan, units={name: dataclasses.replace(unit, proof=narrow) for name, unit in plan.units.items()}
    )
    (parts,) = split(BATCH, micro_batches=1, replicas=1, weights=lambda _: 1.0)
    program = assemble(Model(), BATCH, layout=Layout(tp=2), rank=rank.rank, tensor=plan)
    assert program.divided is not None
    assert program.divided.start_up_errors
    first, second = (dict(program.step(parts, step=step).sent_bytes) for step in range(2))
    assert first == second
    program.close()
