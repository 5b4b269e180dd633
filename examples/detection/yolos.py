"""A YOLOS that learns from nothing: its positions and queries begin apart.

transformers leaves the position embeddings and the detection tokens of a YOLOS at zero, to be filled by a checkpoint:
all queries are then equal at first, and no patch says where it is. Here a patch begins with sines and cosines of its
column and row, as in DETR, and every query with random numbers. All of it is learnt on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import YolosConfig, YolosForObjectDetection

__all__ = ["from_scratch", "sines"]


def from_scratch(
    id2label: Mapping[int, str], num_channels: int, image_size: Sequence[int], **config: object
) -> YolosForObjectDetection:
    """The model of a `YolosConfig`, of which the first three follow from the data."""
    told = YolosConfig(id2label=dict(id2label), num_channels=num_channels, image_size=list(image_size), **config)
    model = YolosForObjectDetection(told)
    embeddings = model.vit.embeddings
    rows, columns = (length // told.patch_size for length in image_size)
    places = torch.zeros_like(embeddings.position_embeddings)  # (1, class token + patches + queries, hidden)
    places[0, 1 : 1 + rows * columns] = 0.5 * sines(rows, columns, told.hidden_size)
    with torch.no_grad():
        embeddings.position_embeddings.copy_(places)
        torch.nn.init.normal_(embeddings.detection_tokens, std=0.5)
    return model


def sines(rows: int, columns: int, width: int) -> torch.Tensor:
    """(rows * columns, width): sine and cosine of the column, then of the row, at width / 4 wavelengths from 2 pi up to
    100 times that (Vaswani et al., "Attention Is All You Need", section 3.5, in two dims)."""
    rates = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (x, y)]
    return torch.cat([turned for angle in angles for turned in (angle.sin(), angle.cos())], dim=1)
