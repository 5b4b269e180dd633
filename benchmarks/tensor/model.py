"""The decoder of this benchmark, shapes and batches. Knows no parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    "SHAPES",
    "Decoder",
    "Shape",
    "attended",
    "batch_of",
    "decoder_of",
    "loss_of",
    "needed_bytes",
    "vocabulary_bytes",
]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder and of its batch."""

    name: str
    hidden: int
    heads: int
    width: int  # of the SwiGLU
    sequence: int = 64
    batch: int = 2
    blocks: int = 8
    vocabulary: int = 1024


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="64", hidden=64, heads=4, width=176, sequence=16),
        Shape(name="256", hidden=256, heads=4, width=704),
        Shape(name="512", hidden=512, heads=8, width=1408),
        Shape(name="1024", hidden=1024, heads=16, width=2816),
    )
}


def needed_bytes(shape: Shape) -> int:
    """Bytes a step that one rank gives to sums of float32: two outputs and two input gradients of each block.

    The count of Shoeybi et al. 2019 (arXiv:1909.08053, section 3).
    """
    return 4 * shape.blocks * shape.batch * shape.sequence * shape.hidden * 4


def vocabulary_bytes(shape: Shape) -> int:
    """The same for a divided embedding and head: the sum behind the lookup, that of the gradient in front of the head,
    and three numbers of each token (largest logit, sum of exponentials, the label's logit)."""
    return 4 * shape.batch * shape.sequence * (2 * shape.hidden + 3)


class Attention(nn.Module):
    """Causal attention with rotary positions. The number of heads is what the projections give."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.hidden // shape.heads
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.v = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.o = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.o(attended(self.q(x), self.k(x), self.v(x), self.head_dim, cos, sin))
        return out


class SwiGLU(nn.Module):
    """arXiv:2002.05202."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden, shape.width, bias=False)
        self.up = nn.Linear(shape.hidden, shape.width, bias=False)
        self.down = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Attention and a SwiGLU, each behind an RMSNorm and beside a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden)
        self.attention: nn.Module = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.hidden)
        self.mlp: nn.Module = SwiGLU(shape)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return out


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_dim: int, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Causal attention of as many heads as the widths hold; all (batch, tokens, heads * head_dim)."""
    samples, tokens, width = query.shape
    query, key, value = (x.view(samples, tokens, -1, head_dim).transpose(1, 2) for x in (query, key, value))
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)  # (batch, heads, tokens, head_dim)
    seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return seen.transpose(1, 2).reshape(samples, tokens, width)


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
        self.embed: nn.Module = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head: nn.Module = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        cos, sin = _tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    cos: torch.Tensor  # (tokens, head_dim)
    sin: torch.Tensor

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the blocks make of the ids, (batch, tokens, hidden)."""
        x: torch.Tensor = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return x

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.norm(self.hidden(input_ids))).flatten(0, 1), labels.flatten())


def decoder_of(shape: Shape) -> nn.Module:
    """A `Decoder`, the same on every rank."""
    torch.manual_seed(0)
    return Decoder(shape)


def batch_of(shape: Shape) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, (batch, sequence) each."""
    random = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.sequence)
    return {
        "input_ids": torch.randint(0, shape.vocabulary, size, generator=random),
        "labels": torch.randint(0, shape.vocabulary, size, generator=random),
    }


def loss_of(output: object) -> torch.Tensor:
    """What a model returned as its loss."""
    loss = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"a model of this benchmark returns its loss, not {type(output).__name__}")
    return loss
