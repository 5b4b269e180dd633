"""What every contender is given: the shapes, the share of a rank, the optimizer's numbers. Knows no contender."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.pipeline.model import SHAPES, Decoder, Shape

__all__ = ["ADAMW", "CLIP", "RANKS", "SETTINGS", "Setting", "batch_of", "decoder", "share_of"]

RANKS = 2
CLIP = 0.5  # below the norm of a fresh model: every step clips
ADAMW: Mapping[str, object] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A decoder and how many of its sequences each rank has in one step, in one micro-batch."""

    name: str
    shape: Shape
    sequences: int


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(name="sequence-64", shape=SHAPES["large-64"], sequences=4),
        Setting(name="sequence-256", shape=SHAPES["large-256"], sequences=2),
        Setting(name="quick", shape=SHAPES["quick"], sequences=2),
        Setting(name="tiny", shape=SHAPES["tiny"], sequences=2),
    )
}


def decoder(setting: Setting) -> Decoder:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    return Decoder(setting.shape)


def batch_of(setting: Setting, step: int) -> dict[str, torch.Tensor]:
    """The whole batch of a step; shares of it are of one size."""
    random = torch.Generator().manual_seed(1 + step % 4)
    size = (RANKS * setting.sequences, setting.shape.sequence)
    return {
        "ids": torch.randint(0, setting.shape.vocabulary, size, generator=random),
        "labels": torch.randint(0, setting.shape.vocabulary, size, generator=random),
    }


def share_of(batch: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """A rank's sequences."""
    return {name: tensor.chunk(RANKS)[rank].contiguous() for name, tensor in batch.items()}
