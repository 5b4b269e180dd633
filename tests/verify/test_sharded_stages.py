"""Stages that hold different parameters, units that return objects of their own: state is divided as on one device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sharded_side import TOLERANCE, Block, Decoder, compare
from shardwise.launch import RankContext
from shardwise.testing import on_ranks


def frozen_at_first() -> nn.Module:
    """A stage that trains nothing, before one that does."""
    model = Decoder()
    model.requires_grad_(False)
    for module in (model.blocks[3], model.head):
        module.requires_grad_(True)
    return model


class Repeated(nn.Module):
    """Blocks that every stage calls; the first stage has more than them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.wide = nn.Sequential(nn.Linear(16, 1024), nn.GELU(), nn.Linear(1024, 16))
        self.blocks = nn.ModuleList([Block(16) for _ in range(2)])
        self.head = nn.Linear(16, 40, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.wide(self.table(ids))
        for _ in range(8):
            for block in self.blocks:
                x = block(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@on_ranks(4, timeout_s=120.0)
def test_a_stage_without_anything_to_divide_is_one_device(rank: RankContext) -> None:
    layout = "pp=2,fsdp=2,zero=1,micro_batches=2"
    assert compare(rank.rank, layout, make=frozen_at_first, clip=0.1).worst <= TOLERANCE


@on_ranks(4, timeout_s=120.0)
@pytest.mark.parametrize("zero", [2, 3])
def test_stages_agree_on_the_buckets_of_what_they_share(rank: RankContext, zero: int) -> None:
    layout = f"pp=2,fsdp=2,zero={zero},micro_batches=2"
    assert compare(rank.rank, layout, make=Repeated, clip=0.1).worst <= TOLERANCE


@dataclasses.dataclass
class Answer:
    """What only the model knows."""

    hidden: torch.Tensor


class Answering(nn.Module):
    """A block that returns an object of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(16)

    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(self.block(x))


class OfAnswers(Decoder):
    """A decoder of such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Answering() for _ in range(3)])

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x).hidden
        logits = self.head(x * self.gain)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@on_ranks(2, timeout_s=60.0)
def test_what_units_return_in_objects_is_gathered_for_too(rank: RankContext) -> None:
    assert compare(rank.rank, "fsdp=2,zero=3", make=OfAnswers, algorithm="ring").worst <= TOLERANCE
