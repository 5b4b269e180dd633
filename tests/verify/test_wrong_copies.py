"""A gradient that is wrong on one rank alone is found, though another rank that holds the same weight has it right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from shardwise.launch import RankStarter
from shardwise.verify import verify

WIDTH = 8
BATCH = {"x": torch.linspace(-1, 1, 4 * WIDTH).sin().view(4, WIDTH)}


class Doubled(torch.autograd.Function):
    """The identity; its gradient is twice as large on every rank but the first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * (1.0 + (dist.is_initialized() and dist.get_rank() > 0))


class Scale(nn.Module):
    """A weight that shards hold alike."""

    def __init__(self, faulty: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.faulty = faulty

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = Doubled.apply(self.weight) if self.faulty else self.weight
        return x * weight


class Model(nn.Module):
    def __init__(self, faulty: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = Scale(faulty)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale(x)
        for block in self.blocks:
            x = x + block(x)
        return F.mse_loss(x, torch.zeros_like(x))


@pytest.mark.parametrize("faulty", [False, True])
def test_a_shard_whose_own_gradient_of_a_shared_weight_is_wrong_is_not_one_device(
    faulty: bool, starter: RankStarter
) -> None:
    comparison = verify(Model(faulty), BATCH, layout="tp=2", starter=starter, timeout_s=60)
    assert comparison.equal is not faulty, str(comparison)
    if faulty:
        worst = max(comparison.tensors, key=lambda error: error.gradient)
        assert worst.name == "scale.weight"
        assert 0.3 < worst.gradient < 3.0
        assert comparison.norm_error < 1e-5  # the first rank's, which is right
