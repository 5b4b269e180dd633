"""The model of the matrix, written as users write theirs: a decoder with attention, places, and blocks with or without
experts. No parameter has a true gradient of zero (a key's bias would). Knows nothing of shardwise.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["TOKENS", "VOCABULARY", "Decoder", "Reader", "batch_of"]

WIDTH, HEADS, INNER, TOKENS = 16, 2, 32, 8
VOCABULARY = 23  # not divisible by the number of any axis
EXPERTS, CHOICES = 4, 2


class Experts(nn.Module):
    """Parameters with a dim of experts in front; a loop over those that are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.count = EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / INNER**0.5)

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(tokens)  # (tokens, width)
        for expert in range(self.count):
            row, choice = torch.where(chosen == expert)
            y = F.gelu(tokens[row] @ self.up[expert]) @ self.down[expert]
            out = out.index_add(0, row, y * gates[row, choice, None])
        return out


class Mixture(nn.Module):
    """Every token goes to `CHOICES` of `EXPERTS`. In and out: (batch, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        gates, chosen = self.router(rows).softmax(-1).topk(CHOICES)
        mixed: torch.Tensor = self.experts(rows, chosen, gates)
        return mixed.view(x.shape)


class FeedForward(nn.Module):
    """In and out: (batch, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(F.gelu(self.up(x)))
        return y


class Block(nn.Module):
    """Attention, then experts or a feed-forward layer, whose share is learned. In and out: (batch, tokens, width)."""

    def __init__(self, *, experts: bool) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = Mixture() if experts else FeedForward()
        self.share = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        y = self.before(x)
        q, k, v = (
            layer(y).view(batch, tokens, -1, WIDTH // HEADS).transpose(1, 2)  # (batch, heads, tokens, head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + self.o_proj(mixed)
        z: torch.Tensor = self.mlp(self.between(x))
        return x + self.share * z


class Decoder(nn.Module):
    """A language model with a loss of its own; tokens know their places from a table."""

    def __init__(self, num_blocks: int, *, experts: bool = False) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block(experts=experts) for _ in range(num_blocks))
        self.dropout: nn.Module = nn.Identity()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.scores(input_ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    def scores(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, VOCABULARY) of tokens (batch, tokens)."""
        x = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = self.dropout(block(x))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Counting(nn.LayerNorm):
    """A norm that counts what it has seen, as BatchNorm does."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.batches += 1
        return super().forward(x)


class Reader(Decoder):
    """The same with dropout, a buffer that training writes, and the loss of whoever trains it."""

    def __init__(self, num_blocks: int, *, experts: bool = False) -> None:
        super().__init__(num_blocks, experts=experts)
        self.dropout, self.norm = nn.Dropout(0.1), Counting(WIDTH)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.scores(input_ids)


def batch_of(num_samples: int) -> dict[str, torch.Tensor]:
    """The same for the same number; a third of the labels do not count, so that micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(num_samples)
    ids = torch.randint(0, VOCABULARY, (num_samples, TOKENS), generator=generator)
    labels = torch.randint(0, VOCABULARY, (num_samples, TOKENS), generator=generator)
    ignored = torch.rand(num_samples, TOKENS, generator=generator) < 1 / 3
    return {"input_ids": ids, "labels": labels.masked_fill(ignored, -100)}
