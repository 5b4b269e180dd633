"""What is differentiated: the model's forward and the loss. Plain Python that every stage runs as glue."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.errors import ModelError
from shardwise.trace.functions import seen_loss

__all__ = ["Batch", "LossFunction", "objective"]

Batch = Mapping[str, Any] | Sequence[Any]
LossFunction = Callable[[Any, Any], torch.Tensor]

_TARGET = "target_"


def objective(model: nn.Module, batch: Batch, loss: LossFunction | None = None) -> torch.Tensor:
    """The scalar loss of a batch: `loss(outputs, batch)`, or what the model itself returns as its loss.

    A mapping is given to `forward` by name, a sequence by position. What is named target_… and is none of the names
    that `forward` lists is for `loss` alone. Raises `ModelError` where there is no loss.
    """
    outputs = model(**_for_model(model, batch)) if isinstance(batch, Mapping) else model(*batch)
    if loss is not None:
        return seen_loss(loss, outputs, batch)
    found = _own_loss(outputs)
    if found is None:
        raise ModelError(
            f"a loss is needed: {type(model).__name__} returned {type(outputs).__name__} without one; give the batch "
            "labels, or pass loss=lambda outputs, batch: ..."
        )
    return found


def _for_model(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch without what only the loss reads."""
    if not any(name.startswith(_TARGET) for name in batch):
        return batch
    listed = inspect.signature(type(model).forward).parameters
    return {name: value for name, value in batch.items() if name in listed or not name.startswith(_TARGET)}


def _own_loss(outputs: Any) -> torch.Tensor | None:
    if isinstance(outputs, torch.Tensor):
        return outputs if outputs.dim() == 0 else None
    if isinstance(outputs, Mapping):
        value = outputs.get("loss")
        return value if isinstance(value, torch.Tensor) else None
    if isinstance(outputs, (tuple, list)):
        first = outputs[0] if outputs else None
        return first if isinstance(first, torch.Tensor) and first.dim() == 0 else None
    value = getattr(outputs, "loss", None)
    return value if isinstance(value, torch.Tensor) else None
