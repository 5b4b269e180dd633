"""A state-space block written by hand, in the manner of Mamba 2 (Dao and Gu 2024, arXiv:2405.21060, listing 1)."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


class GatedNorm(nn.Module):
    """Root mean square norm over the whole width of what the gate lets through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        x = x * F.silu(gate)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Mixer(nn.Module):
    """[z | x | B | C | dt] from one projection; x, B, C through one depthwise convolution; B and C for groups of heads.

    width -> inner = heads * head_dim. With one group of states every head reads the same B and C.
    """

    def __init__(self, width: int = 16, *, heads: int = 4, head_dim: int = 8, state: int = 6, groups: int = 1) -> None:
        super().__init__()
        self.inner, self.heads, self.head_dim = heads * head_dim, heads, head_dim
        self.state, self.groups = state, groups
        self.conv_dim = self.inner + 2 * groups * state
        self.in_proj = nn.Linear(width, self.inner + self.conv_dim + heads, bias=False)
        self.conv = nn.Conv1d(self.conv_dim, self.conv_dim, 3, groups=self.conv_dim, padding=2)
        self.dt_bias = nn.Parameter(torch.rand(heads))
        self.a_log = nn.Parameter(torch.rand(heads))
        self.skip = nn.Parameter(torch.rand(heads))
        self.norm = GatedNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        num, tokens, _ = u.shape
        z, xbc, dt = self.in_proj(u).split([self.inner, self.conv_dim, self.heads], -1)
        xbc = F.silu(self.conv(xbc.transpose(1, 2))[..., :tokens].transpose(1, 2))
        x, b, c = xbc.split([self.inner, self.groups * self.state, self.groups * self.state], -1)
        x = x.reshape(num, tokens, -1, self.head_dim)
        b = b.reshape(num, tokens, self.groups, self.state).repeat_interleave(self.heads // self.groups, 2)
        c = c.reshape(num, tokens, self.groups, self.state).repeat_interleave(self.heads // self.groups, 2)
        dt = F.softplus(dt + self.dt_bias)  # (num, tokens, heads)
        decay = torch.exp(-dt * self.a_log.exp())
        state = x.new_zeros(num, self.heads, self.head_dim, self.state)
        out = []
        for t in range(tokens):
            new = torch.einsum("nhd,nhs->nhds", x[:, t] * dt[:, t, :, None], b[:, t])
            state = decay[:, t, :, None, None] * state + new
            out.append(torch.einsum("nhds,nhs->nhd", state, c[:, t]))
        y = torch.stack(out, 1) + self.skip[:, None] * x  # (num, tokens, heads, head_dim)
        return self.out_proj(self.norm(y.reshape(num, tokens, -1), z))


class StateSpace(nn.Module):
    """A mixer around a residual stream."""

    def __init__(self, width: int = 16, *, groups: int = 1) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.mixer = Mixer(width, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixer(self.before(x))
