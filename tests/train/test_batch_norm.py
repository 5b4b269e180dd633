"""Training with BatchNorm: running statistics of one device on every layout, and replicas that normalise together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwise.launch import RankContext
from shardwise.tasks import Batch, RandomTokens, Split
from shardwise.tasks.task import class_loss
from shardwise.testing import on_ranks
from shardwise.train.build import build
from shardwise.train.run import prepare
from shardwise.train.run_file import run_from

STEPS, GLOBAL_BATCH = 3, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points(RandomTokens):
    """Points of 16 numbers, of 4 classes."""

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, torch.Tensor]:
        tokens = super().samples(indices, split)["input_ids"]
        return {"x": (tokens.float() - 32) / 16, "labels": tokens[:, 0] % 4}

    def loss(self, outputs: object, batch: Batch) -> torch.Tensor:
        return class_loss(outputs, batch)

    def weight(self, batch: Batch) -> float:
        return float(len(batch["labels"]))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=0.3), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained(
    rank: RankContext, folder: Path, layout: str, batch_norm: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and parameters and running statistics that this rank updates."""
    told = {"steps": STEPS, "global_batch": GLOBAL_BATCH, "learning_rate": 0.1, "seed": 3, "optimizer": "sgd"}
    run = run_from({"folder": str(folder), "layout": layout, "training": told, "model": {"batch_norm": batch_norm}})
    world = build(prepare(run, model=Layers, task=Points(num_train=40)), rank)
    losses = []
    for step in range(STEPS):
        losses.append(world.program.step(world.micro_batches(step), step=step).loss)
        for parameter in world.program.parameters.values():
            assert parameter.grad is not None
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
        world.program.updated()
    norms = [name for name, m in world.program.model.named_modules() if isinstance(m, nn.BatchNorm1d)]
    here = [name for name in norms if f"{name}.weight" in world.program.parameters]
    found = {name: p.detach().clone() for name, p in world.program.parameters.items()}
    found |= {name: b.clone() for name, b in world.program.model.named_buffers() if name.rpartition(".")[0] in here}
    world.program.close()
    return losses, found


def check(rank: RankContext, folder: Path, layout: str, alone: str, batch_norm: str) -> None:
    losses, found = trained(rank, folder / "run", layout, batch_norm)
    one = RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")
    wanted_losses, wanted = trained(one, folder / f"alone-{rank.rank}", alone, batch_norm)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)  # float32, three updates
    assert any("running_var" in name for name in found)
    for name, value in found.items():
        assert torch.allclose(value.double(), wanted[name].double(), rtol=1e-4, atol=1e-5), name


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize("layout, alone", [("dp=2", "dp=1,micro_batches=2"), ("pp=2", "dp=1,micro_batches=4")])
def test_two_ranks_have_the_running_statistics_of_one(rank, tmp_path, layout, alone) -> None:
    check(rank, tmp_path, layout, alone, "own")


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_synchronised_replicas_are_one_device_with_their_micro_batches_whole(rank, tmp_path, micro_batches) -> None:
    many = f"micro_batches={micro_batches}"
    check(rank, tmp_path, f"dp=2,{many}", f"dp=1,{many}", "synchronised")


@on_ranks(4, timeout_s=60)
def test_synchronised_replicas_of_a_pipeline_are_one_device(rank, tmp_path) -> None:
    check(rank, tmp_path, "dp=2,pp=2,micro_batches=2", "dp=1,micro_batches=2", "synchronised")
