"""Three modules written as users write them, without a thought of pipelines. Knows nothing of shardwise.

A U-Net whose skips reach across the model, a language model with one table at both ends and parameters used between
its layers, and a policy with two towers: image + instruction -> action.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["TiedReader", "TwoTowerPolicy", "UNet"]


def _double(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Images (batch, 3, side, side) -> maps (batch, 1, side, side); side is a multiple of 8.

    down1 ───────────────────────────► up1 ─► head        Ronneberger, Fischer, Brox 2015
       └► down2 ─────────────► up2 ─────┘
            └► down3 ─► middle ─► up3 ─┘
    """

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = _double(3, 8), _double(8, 16), _double(16, 16)
        self.middle = _double(16, 16)
        self.up3, self.up2, self.up1 = _double(32, 16), _double(32, 8), _double(16, 8)
        self.head = nn.Conv2d(8, 1, 1)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        a = self.down1(image)  # (batch, 8, side, side)
        b = self.down2(F.max_pool2d(a, 2))  # (batch, 16, side / 2, side / 2)
        c = self.down3(F.max_pool2d(b, 2))  # (batch, 16, side / 4, side / 4)
        x = self.middle(F.max_pool2d(c, 2))  # (batch, 16, side / 8, side / 8)
        for up, skip in ((self.up3, c), (self.up2, b), (self.up1, a)):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        x = x * 1.0
        x *= self.gain
        return self.head(x)


class _Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gates = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.gates(self.norm(x)).chunk(2, dim=-1)
        return self.out(value.cumsum(1) / x.shape[1] * torch.sigmoid(gate))


class TiedReader(nn.Module):
    """Token numbers (batch, tokens) -> scores of the token at each place (batch, tokens, vocabulary).

    The embedding is also the head, and the residual sum is weighed between the layers by parameters of the model.
    """

    def __init__(self, *, vocabulary: int, width: int = 24, depth: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(64, width) * 0.1)
        self.weigh = nn.Parameter(torch.ones(depth, width))
        self.layers = nn.ModuleList(_Mixer(width) for _ in range(depth))
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)  # (batch, tokens, width)
        x += self.place[: tokens.shape[1]]
        first = x
        for number, layer in enumerate(self.layers):
            x = x + self.dropout(layer(x)) * self.weigh[number]
        x = self.norm(x + 0.5 * first)
        return F.linear(x, self.embed.weight, self.bias)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norms[0](x)
        source = y if memory is None else memory
        x = x + self.attention(y, source, source, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class TwoTowerPolicy(nn.Module):
    """Image (batch, 3, side, side) and instruction (batch, tokens) -> action (batch, 7), and its loss.

    vision   ─► patches ─► blocks ─┐
    language ─► tokens  ─► blocks ─┴► read by action queries ─► heads: six joints, one gripper
    """

    def __init__(self, *, vocabulary: int, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.words = nn.Embedding(vocabulary, width)
        self.vision = nn.ModuleList(_Block(width) for _ in range(depth))
        self.language = nn.ModuleList(_Block(width) for _ in range(depth))
        self.queries = nn.Parameter(torch.randn(4, width) * 0.1)
        self.temperature = nn.Parameter(torch.zeros(()))
        self.readers = nn.ModuleList(_Block(width) for _ in range(depth))
        self.joints = nn.Linear(4 * width, 6)
        self.gripper = nn.Linear(4 * width, 1)

    def forward(
        self, *, image: torch.Tensor, instruction: torch.Tensor, action: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        seen = self.patches(image).flatten(2).transpose(1, 2)  # (batch, patches, width)
        said = self.words(instruction)  # (batch, tokens, width)
        for look in self.vision:
            seen = look(seen)
        for read in self.language:
            said = read(said)
        memory = torch.cat([seen, said], dim=1) * self.temperature.exp()
        state = self.queries.expand(image.shape[0], -1, -1)  # (batch, 4, width)
        for reader in self.readers:
            state = reader(state, memory)
        flat = state.flatten(1)
        predicted = torch.cat([self.joints(flat), torch.tanh(self.gripper(flat))], dim=1)  # (batch, 7)
        answer = {"action": predicted}
        if action is not None:
            answer["loss"] = F.smooth_l1_loss(predicted, action)
        return answer
