"""Ranks that divide sequences send each other own tokens: between stages, around the ring, and sums of the loss."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.testing import on_ranks

SAMPLES, TOKENS, WIDTH = 4, 8, 16
BATCH = {"x": torch.linspace(-1, 1, SAMPLES * TOKENS * WIDTH).view(SAMPLES, TOKENS, WIDTH)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.into(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Four blocks, with the sums between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.mse_loss(x, torch.zeros_like(x))


def sent_in_a_step(rank: RankContext, layout: Layout) -> dict[str, int]:
    parts = split(BATCH, micro_batches=2, replicas=1, weights=lambda _: 1.0)
    program = assemble(Model(), parts[0][0].inputs, layout=layout, rank=rank.rank)
    program.step(parts[0], step=0)  # with headers
    sent = dict(program.step(parts[0], step=1).sent_bytes)
    program.close()
    return sent


@on_ranks(4, timeout_s=120.0)
def test_stages_send_own_tokens_and_nobody_gathers_all(rank: RankContext) -> None:
    sent = sent_in_a_step(rank, Layout(pp=2, cp=2, micro_batches=2))
    own = 4 * SAMPLES * TOKENS * WIDTH // 2  # bytes of the activations of all micro-batches
    assert sent["pp.send"] == own  # there, and their gradients back
    assert sent["cp.all_gather"] == sent["cp.reduce_scatter"] == 0
    assert sent["cp.send"] == 2 * (2 + 2 + 2) * own  # of two blocks: keys and values, again, and their gradients
