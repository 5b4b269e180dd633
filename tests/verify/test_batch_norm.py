"""Replicas that normalise together are one device that has their micro-batches whole; alone they are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardwise.layout import SYNCHRONISED, Techniques
from shardwise.verify import verify


class Net(nn.Module):
    """Two layers with BatchNorm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.second(self.first(x)).mean((2, 3))), labels)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp=2,micro_batches=2", "dp=2,pp=2,micro_batches=2"])
def test_statistics_of_all_replicas_are_proven_against_one_device(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(12, 1, 8, 8, generator=generator), "labels": torch.arange(12) % 3}
    together = verify(Net, batch, layout=layout, steps=2, techniques=Techniques(batch_norm=SYNCHRONISED))
    assert together.equal
    alone = verify(Net, batch, layout=layout, steps=2)
    assert alone.equal
    assert together.loss != alone.loss  # they are not the same model
