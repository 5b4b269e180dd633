"""The model of this benchmark, its shapes, and the cut that all contenders use. Knows no pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["SHAPES", "Decoder", "Part", "Shape", "loss_of"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the decoder and of its batch; the micro-batches have one sequence each."""

    name: str
    hidden: int
    heads: int
    width: int  # of the SwiGLU
    sequence: int
    blocks: int = 8
    vocabulary: int = 8192
    micro_batches: int = 8


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="tiny", hidden=64, heads=4, width=176, sequence=16),
        Shape(name="large-64", hidden=512, heads=8, width=1408, sequence=64),
        Shape(name="large-256", hidden=512, heads=8, width=1408, sequence=256),
        Shape(name="quick", hidden=256, heads=4, width=704, sequence=64),
    )
}


class Block(nn.Module):
    """Attention and a SwiGLU, each behind an RMSNorm and beside a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.RMSNorm(shape.hidden)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.hidden)
        self.gate = nn.Linear(shape.hidden, shape.width, bias=False)
        self.up = nn.Linear(shape.hidden, shape.width, bias=False)
        self.down = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (batch, heads, tokens, head_dim)
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, hidden))
        y = self.mlp_norm(x)
        mixed: torch.Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + mixed


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv:2104.09864), halves paired as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _tables(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    head_dim = shape.hidden // shape.heads
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(shape.sequence), frequencies)  # (tokens, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class Decoder(nn.Module):
    """The whole model, as a user writes it: ids and labels in, the mean loss of the tokens out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        cos, sin = _tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    cos: torch.Tensor  # (tokens, head_dim)
    sin: torch.Tensor

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return loss_of(self.head(self.norm(x)), labels)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, the mean over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Part(nn.Module):
    """One of two halves of a `Decoder`, as pipelines want it that are given modules: one tensor in, one out."""

    def __init__(self, model: Decoder, stage: int) -> None:
        super().__init__()
        half = len(model.layers) // 2
        self.embed = model.embed if stage == 0 else None
        kept = range(half) if stage == 0 else range(half, len(model.layers))
        self.layers = nn.ModuleDict({str(index): model.layers[index] for index in kept})  # named as in the whole
        self.norm = model.norm if stage == 1 else None
        self.head = model.head if stage == 1 else None
        self.register_buffer("cos", model.cos, persistent=False)
        self.register_buffer("sin", model.sin, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x
