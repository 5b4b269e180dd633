"""The loss of a detector that answers with a set: every box has the query that it is matched with, the others say no
object.

                    class                         box
    matched query   -log p(class of its box)      l1_term * L1 + giou_term * (1 - generalised IoU)
    other queries   -no_object * log p(none)

Everything is a sum over an image's queries and boxes, so the loss is a mean over images: that of a batch is the mean of
its micro-batches', however boxes are spread over them, and images without a box count. DETR divides class terms by
their weights and box terms by the boxes of the batch, which no mean of micro-batches is. It knows no images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.boxes import corners, generalised_iou
from shardwise.tasks.set_matching import matched_queries
from shardwise.tasks.task import IGNORED_LABEL, logits_of

__all__ = ["SetLoss", "boxes_of"]


@runtime_checkable
class _WithBoxes(Protocol):
    pred_boxes: Tensor


def boxes_of(outputs: object) -> Tensor:
    """The boxes that a model returned, (batch, queries, 4) by middle and size: `pred_boxes`, by name or attribute.

    Raises ConfigError where there are none.
    """
    found = outputs.get("pred_boxes") if isinstance(outputs, Mapping) else None
    if found is None and isinstance(outputs, _WithBoxes):
        found = outputs.pred_boxes
    if not isinstance(found, Tensor):
        raise ConfigError(f"a detector returns logits and pred_boxes; got {type(outputs).__name__}; return them")
    return found


@dataclass(frozen=True, kw_only=True)
class SetLoss:
    """Terms of the loss and of the matching cost, as DETR weighs them; `per_image` divides an image's sum: boxes that
    an image has on average, so that the loss is about that of a box."""

    class_term: float = 1.0
    l1_term: float = 5.0
    giou_term: float = 2.0
    no_object: float = 0.1
    per_image: float = 1.0

    def __post_init__(self) -> None:
        terms = (self.class_term, self.l1_term, self.giou_term, self.no_object)
        if min(terms) < 0 or self.per_image <= 0:
            raise ConfigError(
                f"terms of a loss are not negative, but class, L1, GIoU and no-object are {terms}; use 1, 5, 2 and 0.1"
            )

    def of(self, outputs: object, target_labels: Tensor, target_boxes: Tensor) -> Tensor:
        """Mean over the images of a batch, scalar, float32.

        Logits (batch, queries, classes + 1), no object last; boxes as in `boxes_of`. Targets are labels, int64 (batch,
        targets), IGNORED_LABEL for none, and boxes by middle and size, (batch, targets, 4). Raises ConfigError as
        `matched_queries` does.
        """
        logits, boxes = logits_of(outputs).float(), boxes_of(outputs).float()
        labels, wanted = target_labels.to(logits.device), target_boxes.to(logits.device)
        counted = labels != IGNORED_LABEL  # (batch, targets)
        terms = (self.class_term, self.l1_term, self.giou_term)
        matched = matched_queries(logits, boxes, labels, wanted, terms=terms)  # (batch, targets)
        chosen = torch.where(counted, matched, 0)[..., None].expand(-1, -1, 4)
        found = boxes.gather(1, chosen)  # (batch, targets, 4)
        apart = self.l1_term * (found - wanted).abs().sum(-1)
        apart = apart + self.giou_term * (1 - generalised_iou(corners(found), corners(wanted)))
        classes = self._classes(logits, matched, labels, counted)
        return (classes + torch.where(counted, apart, 0).sum()) / (self.per_image * len(logits))

    def _classes(self, logits: Tensor, matched: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """Sum over all queries of what their class costs: that of their box, or none."""
        batch, queries, none = logits.shape[0], logits.shape[1], logits.shape[2] - 1
        # a query more, which is cut off, takes what belongs to none
        wanted = labels.new_full((batch, queries + 1), none)
        wanted = wanted.scatter(1, torch.where(counted, matched, queries), torch.where(counted, labels, none))
        wanted = wanted[:, :queries]  # (batch, queries)
        cost = -logits.log_softmax(-1).gather(2, wanted[..., None])[..., 0]
        return self.class_term * (torch.where(wanted == none, self.no_object, 1.0) * cost).sum()
