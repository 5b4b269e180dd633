"""Small models for the matrix: written as users write them, each with one thing that a schedule could get wrong.

`decoder` is the usual row of blocks, `attending` has blocks with attention, whose heads shards divide; `tied` uses its
table at both ends; `skips` reads values of the first blocks in the last ones; `dropout` draws random numbers. No
parameter has a true gradient of zero (a key's bias would), of which there is no relative error. Knows nothing of
shardwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["MODELS", "TOKENS", "VOCABULARY", "batch_of"]

WIDTH, HEADS, VOCABULARY, TOKENS = 16, 2, 24, 6


class Block(nn.Module):
    """A feed-forward layer. In and out: (batch, tokens, width)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(F.gelu(self.up(self.norm(x))))
        return x + (F.dropout(y, self.dropout, self.training) if self.dropout else y)


class AttendingBlock(nn.Module):
    """Attention and a feed-forward layer. In and out: (batch, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        y = self.norm(x)
        q, k, v = (
            layer(y).view(batch, tokens, -1, WIDTH // HEADS).transpose(1, 2)  # (batch, heads, tokens, head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + self.o_proj(mixed)
        z: torch.Tensor = self.down(F.gelu(self.up(x)))
        return x + z


class Decoder(nn.Module):
    """A language model with a loss of its own."""

    def __init__(self, blocks: Sequence[nn.Module], *, tied: bool = False, skips: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.skips = skips

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Mapping[str, torch.Tensor]:
        x: torch.Tensor = self.embed(input_ids)
        below: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            if self.skips and index < len(self.blocks) // 2:
                below.append(x)
            elif below:
                x = x + 0.5 * below.pop()
            x = block(x)
        logits = self.head(self.norm(x))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


MODELS: Mapping[str, Callable[[int], nn.Module]] = {  # called with the number of blocks
    "decoder": lambda n: Decoder([Block() for _ in range(n)]),
    "attending": lambda n: Decoder([AttendingBlock() for _ in range(n)]),
    "tied": lambda n: Decoder([Block() for _ in range(n)], tied=True),
    "skips": lambda n: Decoder([Block() for _ in range(n)], skips=True),
    "dropout": lambda n: Decoder([Block(dropout=0.2) for _ in range(n)]),
}


def batch_of(num_samples: int) -> dict[str, torch.Tensor]:
    """The same for the same number; a third of the labels do not count, so that micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(num_samples)
    ids = torch.randint(0, VOCABULARY, (num_samples, TOKENS), generator=generator)
    labels = torch.randint(0, VOCABULARY, (num_samples, TOKENS), generator=generator)
    ignored = torch.rand(num_samples, TOKENS, generator=generator) < 1 / 3
    return {"input_ids": ids, "labels": labels.masked_fill(ignored, -100)}
