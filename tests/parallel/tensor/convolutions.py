"""Convolutional blocks written by hand: a bottleneck, an inverted residual with squeeze-excitation."""

from __future__ import annotations

import torch
import torch.nn as nn


class Bottleneck(nn.Module):
    """1x1, 3x3 (in groups), 1x1, with BatchNorm behind each, around a shortcut (He et al. 2016, Xie et al. 2017)."""

    def __init__(self, channels: int = 16, inner: int = 8, *, groups: int = 1) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.second = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.third, self.norm3 = nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(self.first(x)).relu()
        y = self.norm2(self.second(y)).relu()
        return (x + self.norm3(self.third(y))).relu()


class Squeeze(nn.Module):
    """Channels weighed by what is in all of them (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Inverted(nn.Module):
    """Wide inside, depthwise between, squeezed or not (Sandler et al. 2018, Tan and Le 2019)."""

    def __init__(self, channels: int = 16, inner: int = 32, *, squeeze: bool = False) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.squeeze = Squeeze(inner) if squeeze else nn.Identity()
        self.project, self.norm3 = nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.norm1(self.expand(x)))
        y = nn.functional.silu(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(self.squeeze(y)))


class Next(nn.Module):
    """Depthwise over whole channels, a norm over all of them, then a wide MLP (Liu et al. 2022)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(nn.functional.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)
