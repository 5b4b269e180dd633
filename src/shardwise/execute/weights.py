"""What the loss of a micro-batch weighs in the mean over the global batch. Knows labels; refuses to know layouts.

Some losses divide by a number of items that the batch brings along (`num_items_in_batch` of transformers): the sum
of the micro-batches' losses is then the mean of the global batch. Here a micro-batch brings its own number instead,
and its loss is a mean that is weighted like any other:

    sum_m / N   =   (sum_m / n_m) · (n_m / N)         n_m items in micro-batch m, N in the global batch

So a model that takes the number and one that leaves it unread, or adds terms that are no sums over items (a router's
load balancing), come out right alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.errors import BatchError

__all__ = ["ITEMS", "Weigher", "weigher", "with_own_items"]

ITEMS = "num_items_in_batch"

# transformers' `loss_type`s whose loss predicts the next token (its LOSS_MAPPING), unless an encoder is in front.
_NEXT_TOKEN = ("ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration")


class Weigher:
    """Weighs a batch by the labels that count (not -100), else by its samples.

    With `shifts`, the first label of every sequence is dropped, as by losses that predict the next token; labels that
    are shifted already come as `shift_labels` and count as they are.
    """

    def __init__(self, *, shifts: bool) -> None:
        self.shifts = shifts

    def __call__(self, inputs: Any) -> float:
        """What the loss of `inputs` weighs."""
        labels = self._labels(inputs)
        if labels is not None:
            return float((labels != -100).sum().item())
        tensors = [leaf for leaf in (inputs.values() if isinstance(inputs, Mapping) else inputs) if _is_batch(leaf)]
        return float(tensors[0].shape[0]) if tensors else 1.0

    def of_parts(self, parts: Sequence[Any]) -> list[float]:
        """What every part weighs; labels of one shape are counted in one go."""
        labels = [self._labels(part) for part in parts]
        found = [label for label in labels if label is not None]
        if len(found) < len(parts) or len({(label.shape, label.device) for label in found}) > 1:
            return [self(part) for part in parts]
        counts = torch.stack(found) != -100
        if counts.dim() > 1:
            counts = counts.flatten(1).sum(1)
        return [float(count) for count in counts.tolist()]

    def _labels(self, inputs: Any) -> torch.Tensor | None:
        """The labels that the loss counts; None where there are none."""
        if not isinstance(inputs, Mapping):
            return None
        shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
        if isinstance(shifted, torch.Tensor):
            return shifted
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            return None
        return labels[..., 1:] if self.shifts and labels.dim() > 1 else labels


def weigher(model: nn.Module) -> Weigher:
    """A weight function for a model's batches: the labels that count (not -100), else the samples.

    Models that predict the next token drop the first label of every sequence; that is asked of transformers'
    `loss_type`. Labels that are shifted already come as `shift_labels` and count as they are.
    """
    return Weigher(shifts=_shifts(model))


def with_own_items(batch: Any, parts: Sequence[Any], weights: Sequence[float]) -> list[Any]:
    """`parts` of a batch; where the batch says `num_items_in_batch`, each part says its own weight instead, 1 at least.

    The number becomes a tensor without dims: a dataflow is traced once, whatever it is. Raises `BatchError` where what
    the batch says is no number, or another one than its labels are counted to.
    """
    given = batch.get(ITEMS) if isinstance(batch, Mapping) else None
    if given is None:
        return list(parts)
    if isinstance(given, bool) or not (isinstance(given, int | float) or _is_scalar(given)):
        shown = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
        raise BatchError(f"{ITEMS} is one number for the global batch, but got {shown}; give the number")
    counted, told = sum(weights), float(given)
    if abs(counted - told) > 1e-6 * max(1.0, abs(counted)):
        raise BatchError(
            f"{ITEMS} is the number of labels that count in the global batch (not -100, and not the first of a "
            f"sequence where the next token is predicted): there are {counted:g}, but the batch says {told:g}; say "
            f"{counted:g}, leave it out, or give weight= where the loss counts otherwise"
        )
    device = given.device if isinstance(given, torch.Tensor) else None
    return [{**part, ITEMS: _number(weight, device)} for part, weight in zip(parts, weights, strict=True)]


def _number(weight: float, device: torch.device | None) -> torch.Tensor:
    """The divisor of a sum over `weight` items, (), int64 where it is whole; 1 for an empty sum."""
    number = weight if weight > 0 else 1.0
    return torch.tensor(int(number) if number == int(number) else number, device=device)


def _shifts(model: nn.Module) -> bool:
    told = getattr(model, "loss_type", None)
    if not isinstance(told, str):
        return "CausalLM" in type(model).__name__
    encoded = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return told in _NEXT_TOKEN and not encoded


def _is_scalar(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() == 0


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0
