"""Boxes as four numbers in a last dim: two forms, areas, and how much two boxes have of each other.

    corners   left, top, right, bottom          middle   x and y of the middle, width, height

Both in shares of the image's width and height, y downwards. It knows rectangles; it refuses to know images and classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["corners", "generalised_iou", "middles"]


def corners(middle: Tensor) -> Tensor:
    """(..., 4): left, top, right, bottom of boxes that are given by middle and size."""
    x, y, width, height = middle.unbind(-1)
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), dim=-1)


def middles(corner: Tensor) -> Tensor:
    """(..., 4): middle and size of boxes that are given by their corners."""
    left, top, right, bottom = corner.unbind(-1)
    return torch.stack(((left + right) / 2, (top + bottom) / 2, right - left, bottom - top), dim=-1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes given by corners, (..., 4) and (..., 4) -> (...), in [-1, 1].

    IoU - (hull - union) / hull, where the hull is the smallest box around both: 1 for equal boxes, and below 0 the
    farther apart they are (Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, algorithm 1). The dims
    before the last are broadcast. A box without area has nothing of another.
    """
    union, both = _area(a) + _area(b), _overlap(a, b)
    union = union - both
    hull = _area(torch.cat((torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])), dim=-1))
    smallest = torch.finfo(union.dtype).tiny
    return both / union.clamp(min=smallest) - (hull - union) / hull.clamp(min=smallest)


def _area(box: Tensor) -> Tensor:
    """(..., 4) corners -> (...)"""
    return (box[..., 2] - box[..., 0]).clamp(min=0) * (box[..., 3] - box[..., 1]).clamp(min=0)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Area that two boxes share, (...)"""
    return _area(torch.cat((torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])), dim=-1))
