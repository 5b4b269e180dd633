"""Gradients that are reduced to parts and compressed: matrices are found where they lie in a bucket."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Communication, Layout, Techniques
from shardwise.testing import on_ranks


class Wide(nn.Module):
    """Biases of 10 elements between matrices, whose gradients have rank 1 for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 30))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.body(x)
        return {"loss": F.mse_loss(x, y), "logits": x}


def gradients(rank: int, communication: Communication) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Wide()
    sample = torch.randn(1, 30).expand(2, 30).contiguous()
    parts = split({"x": sample, "y": sample.sin()}, micro_batches=1, replicas=2, weights=weigher(model))
    program = assemble(
        model,
        parts[0][0].inputs,
        layout=Layout.parse("fsdp=2,zero=2"),
        rank=rank,
        units=["body"],
        techniques=Techniques(communication=communication),
    )
    program.step(parts[program.place.replica], step=0)
    found = {name: gradient.clone() for name, gradient in program.gradients() if gradient is not None}
    program.close()
    return found


@on_ranks(2, timeout_s=60.0)
def test_a_gradient_of_rank_one_survives_powersgd_of_rank_one(rank: RankContext) -> None:
    wanted = gradients(rank.rank, Communication())
    for name, gradient in gradients(rank.rank, Communication(gradients="powersgd:1")).items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error <= 1e-3, f"{name}: {error:.1e}"
