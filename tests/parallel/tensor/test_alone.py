"""Layers that no row reads are divided by columns, their outputs joined."""

from __future__ import annotations

import torch
import torch.nn as nn

from parallel.tensor.blocks import Model
from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.plan_tensor import plan_tensor


class Mixer(nn.Module):
    """A layer between two norms, and a convolution in four groups."""

    def __init__(self, *, groups: int = 4) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.convolution = nn.Conv1d(16, 32, 3, padding=1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm(self.mix(x))
        y = self.convolution(x.transpose(1, 2)).transpose(1, 2)  # (samples, tokens, 32)
        return x * y.chunk(2, -1)[0].softmax(-1) + y.chunk(2, -1)[1]


def test_a_layer_in_front_of_a_norm_is_joined_in_front_of_it() -> None:
    plan = plan_tensor(Model(Mixer(), Mixer()), (torch.randn(2, 5, 16),), tp=2)
    found = plan.units["blocks.0"]

    assert found.alone["mix"] == Slice.even(-1, 16, 2)
    assert found.slices["mix.weight"] == Slice.even(0, 16, 2)
    assert "mix" in found.copies
    assert plan.sharded_share == 1.0


def test_a_convolution_in_groups_is_given_the_channels_of_its_groups() -> None:
    found = plan_tensor(Model(Mixer()), (torch.randn(2, 5, 16),), tp=2).units["blocks.0"]

    assert found.cuts["convolution"] == Slice.even(-2, 16, 2)
    assert found.attributes["convolution", "groups"] == (2, 2)
    assert found.slices["convolution.weight"] == Slice.even(0, 32, 2)
    assert "convolution" not in found.copies


def test_groups_that_do_not_divide_stay_whole() -> None:
    plan = plan_tensor(Model(Mixer()), (torch.randn(2, 5, 16),), tp=8)

    assert set(plan.units["blocks.0"].alone) == {"mix"}
    assert 0 < plan.sharded_share < 1


def test_a_transposed_convolution_is_divided_by_its_outputs() -> None:
    class Upscale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(16, 24, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x.transpose(1, 2)).transpose(1, 2).softmax(-1)[..., :16]

    plan = plan_tensor(Model(Upscale()), (torch.randn(2, 5, 16),), tp=2)
    found = plan.units["blocks.0"]

    assert found.slices == {"up.weight": Slice.even(1, 24, 2), "up.bias": Slice.even(0, 24, 2)}
    assert plan.sharded_share == 1.0
