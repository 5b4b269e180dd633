"""A detector with a set loss is one device on every layout: loss, gradients, weights. Its matching looks at values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from models import Example

from one_process import run_whole, traced, worst_error
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


def detr() -> hf.DetrForObjectDetection:
    """A ConvNeXt, an encoder and a decoder."""
    backbone = hf.ConvNextConfig(
        num_channels=1, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], patch_size=2
    )
    config = hf.DetrConfig(
        backbone_config=backbone,
        num_channels=1,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=QUERIES,
        num_labels=CLASSES,
    )
    return hf.DetrForObjectDetection(config)


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


@pytest.mark.parametrize("factory", [yolos, detr])
def test_stages_of_a_detector_are_the_model(factory: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    made = Example(model=factory().eval(), batch=batch(4), loss=loss)
    wanted, wanted_gradients = run_whole(made)
    trace = traced(made)
    assert "_Matching" in [node.name for node in trace.tape.flow.nodes]
    for num_stages in (2, 3):
        value, gradients = trace.run(trace.cut(num_stages))
        assert value == pytest.approx(wanted, rel=1e-5)
        assert worst_error(gradients, wanted_gradients) <= 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("pp=2,micro_batches=4", marks=pytest.mark.slow),
        "dp=2,micro_batches=2",
        "tp=2,micro_batches=2",
    ],
)
def test_a_detector_is_one_device(layout: str, starter: RankStarter) -> None:
    comparison = verify(yolos, batch(), layout=layout, loss=loss, weight=weight, steps=2, starter=starter)
    assert comparison.equal, str(comparison)
