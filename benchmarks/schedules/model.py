"""The decoder of this benchmark and its cuts into stages, which all contenders use. Knows no pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn as nn

from benchmarks.pipeline.model import Decoder, Shape

__all__ = ["SHAPES", "Stage", "batch_of", "decoder", "unit_names"]

# the head is 0.16 of a block in products: stages of equally many blocks are nearly equal
SHAPES = {
    "full": Shape(name="full", hidden=512, heads=8, width=1408, sequence=256, vocabulary=1024),
    "quick": Shape(name="quick", hidden=128, heads=4, width=352, sequence=32, vocabulary=256),
}


def decoder(shape: Shape) -> Decoder:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Decoder(shape)


def batch_of(shape: Shape) -> dict[str, torch.Tensor]:
    """One sequence for each micro-batch: ids and labels (micro-batches, tokens)."""
    random = torch.Generator().manual_seed(1)
    size = (shape.micro_batches, shape.sequence)
    return {
        "ids": torch.randint(0, shape.vocabulary, size, generator=random),
        "labels": torch.randint(0, shape.vocabulary, size, generator=random),
    }


def unit_names(shape: Shape, num_stages: int) -> tuple[tuple[str, ...], ...]:
    """The units of every stage: equally many blocks, the embedding with the first, norm and head with the last."""
    blocks = [tuple(f"layers.{index}" for index in part) for part in _blocks(shape.blocks, num_stages)]
    blocks[0] = ("embed", *blocks[0])
    blocks[-1] = (*blocks[-1], "norm", "head")
    return tuple(blocks)


class Stage(nn.Module):
    """One stage of a `Decoder`, as pipelines want it that are given modules: one tensor in, one out.

    Parameters are named as in the whole model.
    """

    def __init__(self, model: Decoder, stage: int, num_stages: int) -> None:
        super().__init__()
        first, last = stage == 0, stage == num_stages - 1
        self.embed = model.embed if first else None
        kept = _blocks(len(model.layers), num_stages)[stage]
        self.layers = nn.ModuleDict({str(index): model.layers[index] for index in kept})
        self.norm = model.norm if last else None
        self.head = model.head if last else None
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


def _blocks(num_blocks: int, num_stages: int) -> Sequence[range]:
    bounds = [num_blocks * stage // num_stages for stage in range(num_stages + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]
