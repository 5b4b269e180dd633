"""A policy that sees, reads and acts: pixels and an instruction to an action. Knows nothing of shardwise.

    images      ──► vision: patches ─► blocks ────────────────────┐
    instruction ──► language: words ─► blocks ──► read by fusion ─┴─► one vector a step ─► memory ─► head: actions

The blocks are those of a transformer, normed first. Fusion looks at the patches of one image and reads the instruction;
memory looks back at the steps before, and at what was done in them.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["Policy"]


class Attention(nn.Module):
    """Queries (batch, tokens, width) read a source (batch, other tokens, width), by default themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self,
        x: torch.Tensor,
        source: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        source = x if source is None else source
        q, k, v = (self._heads(made) for made in (self.query(x), self.key(source), self.value(source)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)  # (batch, heads, tokens, …)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Tokens look at each other, at a text if the block reads one, and are transformed one by one."""

    def __init__(self, width: int, heads: int, *, reads: bool = False) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.read_norm = nn.LayerNorm(width) if reads else None
        self.reading = Attention(width, heads) if reads else None
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """`mask` is that of the text where the block reads one, else that of its own tokens."""
        x = x + self.attention(self.norm(x), mask=None if self.reading else mask, causal=causal)
        if self.reading is not None and self.read_norm is not None:
            x = x + self.reading(self.read_norm(x), text, mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class Vision(nn.Module):
    """Images uint8 (images, channels, side, side) -> patches (images, patches, width)."""

    def __init__(self, *, channels: int, image_size: int, patch: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(torch.randn((image_size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images.float() / 127.5 - 1).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Language(nn.Module):
    """Word numbers (batch, words), 0 where there is none -> (batch, words, width)."""

    def __init__(self, *, vocabulary_size: int, num_words: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, width)
        self.places = nn.Parameter(torch.randn(num_words, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.words(words) + self.places
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)


class Fusion(nn.Module):
    """Patches (images, patches, width) and the text of each (images, words, width) -> (images, width)."""

    def __init__(self, *, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, reads=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.wanted = nn.Parameter(torch.randn(1, width) * 0.02)
        self.look = Attention(width, heads)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, text, mask=mask)
        x = self.norm(x)
        return self.look(self.wanted.expand(len(x), -1, -1), x).squeeze(1)


class Memory(nn.Module):
    """Vectors of steps (batch, steps, width) and the action before each (batch, steps) -> scores of actions."""

    def __init__(self, *, num_actions: int, num_steps: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.before = nn.Embedding(num_actions + 1, width)
        self.places = nn.Parameter(torch.randn(num_steps, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_actions)

    def forward(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        x = x + self.before(previous) + self.places[: x.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))


class Policy(nn.Module):
    """images uint8 (batch, steps, channels, side, side), instruction (batch, words), previous actions (batch, steps) ->
    logits (batch, steps, actions), those of a step from it and the steps before."""

    def __init__(
        self,
        *,
        num_actions: int,
        vocabulary_size: int,
        num_words: int,
        num_steps: int,
        num_channels: int = 3,
        image_size: int = 28,
        patch: int = 4,
        width: int = 64,
        heads: int = 4,
        vision_depth: int = 2,
        language_depth: int = 1,
        fusion_depth: int = 1,
        memory_depth: int = 2,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "heads": heads}
        self.vision = Vision(channels=num_channels, image_size=image_size, patch=patch, depth=vision_depth, **sizes)
        self.language = Language(vocabulary_size=vocabulary_size, num_words=num_words, depth=language_depth, **sizes)
        self.fusion = Fusion(depth=fusion_depth, **sizes)
        self.memory = Memory(num_actions=num_actions, num_steps=num_steps, depth=memory_depth, **sizes)

    def forward(self, images: torch.Tensor, instruction: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        batch, steps = images.shape[:2]
        seen = self.vision(images.flatten(0, 1))  # (batch * steps, patches, width)
        mask = (instruction != 0)[:, None, None]  # (batch, 1, 1, words)
        said = self.language(instruction, mask)  # (batch, words, width)
        read = self.fusion(seen, said.repeat_interleave(steps, 0), mask.repeat_interleave(steps, 0))
        return self.memory(read.unflatten(0, (batch, steps)), previous)
