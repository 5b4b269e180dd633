"""What the loss of a micro-batch weighs in the mean over the global batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn

__all__ = ["weigher"]


def weigher(model: nn.Module) -> Callable[[Any], float]:
    """A weight function for a model's batches: the labels that count (not -100), else the samples.

    Models that predict the next token drop the first label of every sequence; that is asked of transformers'
    `loss_type`.
    """
    shifts = "CausalLM" in str(getattr(model, "loss_type", None) or type(model).__name__)

    def weight(inputs: Any) -> float:
        tensors = [leaf for leaf in (inputs.values() if isinstance(inputs, Mapping) else inputs) if _is_batch(leaf)]
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
            counted = labels[..., 1:] if shifts and labels.dim() > 1 else labels
            return float((counted != -100).sum().item())
        return float(tensors[0].shape[0]) if tensors else 1.0

    return weight


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0
