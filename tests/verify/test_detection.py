"""A detector with a set loss is one device on every layout: loss, gradients, weights. Its matching looks at values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from shardwise.launch import RankStarter
from shardwise.tasks.set_loss import SetLoss
from shardwise.verify import verify

QUERIES, CLASSES = 5, 3


def yolos() -> hf.YolosForObjectDetection:
    """Its query embeddings begin at zero, so that its queries are equal in the first step."""
    config = hf.YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[16, 16],
        patch_size=8,
        num_channels=1,
        num_detection_tokens=QUERIES,
        num_labels=CLASSES,
    )
    return hf.YolosForObjectDetection(config)


def batch(size: int = 8) -> dict[str, torch.Tensor]:
    """Images with 0 to 3 boxes, so that micro-batches have different numbers of them, and one has none."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (size, 3), generator=generator)
    labels[torch.arange(3) >= (torch.arange(size) // 2)[:, None]] = -100
    return {
        "pixel_values": torch.randn(size, 1, 16, 16, generator=generator),
        "target_labels": labels,
        "target_boxes": torch.rand(size, 3, 4, generator=generator) * 0.4 + 0.2,
    }


def loss(outputs: object, inputs: Any) -> torch.Tensor:
    return SetLoss(per_image=1.5).of(outputs, inputs["target_labels"], inputs["target_boxes"])


def weight(inputs: Any) -> float:
    return float(len(inputs["target_labels"]))


@pytest.mark.parametrize("layout", ["pp=2,micro_batches=4", "dp=2,micro_batches=2", "tp=2,micro_batches=2"])
def test_a_detector_is_one_device(layout: str, starter: RankStarter) -> None:
    comparison = verify(yolos, batch(), layout=layout, loss=loss, weight=weight, steps=2, starter=starter)
    assert comparison.equal, str(comparison)
