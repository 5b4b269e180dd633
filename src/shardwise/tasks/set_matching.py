"""Which of a detector's queries answers for which box: the assignment of an image that costs least.

    queries   q0  q1  q2  q3            cost of (query, box) = - class_term * probability of the box's class
    boxes         b1      b0    b2=none                        + l1_term    * |middle and size - the box's| summed
    matched   b0 -> 3,  b1 -> 1, none -> -1                    - giou_term  * generalised IoU

The bipartite matching of DETR (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, equation 1),
by the Hungarian method of scipy. Which query it is depends on values, the shape of the answer does not. Queries that
are equal, as those of a model whose query embeddings begin at zero, are told apart by their numbers: rounding, which
differs by layout, must not decide. It refuses to know losses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.boxes import corners, generalised_iou
from shardwise.tasks.task import IGNORED_LABEL

__all__ = ["matched_queries", "matching_cost"]

_TIE = 1e-5  # of costs that are about 1, and rounded to about 1e-7
_WORST = 1e6  # in place of a cost that is no number: the loss tells it


def matching_cost(
    logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor, *, terms: tuple[float, float, float]
) -> Tensor:
    """(batch, queries, targets): what it costs that a query answers for a target; of no target it is any number.

    Logits (batch, queries, classes + 1), boxes (batch, queries, 4) and target boxes (batch, targets, 4) by middle and
    size, target labels (batch, targets); `terms` weigh class, L1 and generalised IoU.
    """
    of_class, of_l1, of_giou = terms
    chances = logits.softmax(-1)  # (batch, queries, classes + 1)
    classes = target_labels.clamp(min=0, max=logits.shape[2] - 1)[:, None, :].expand(-1, logits.shape[1], -1)
    cost = -of_class * chances.gather(2, classes)
    cost = cost + of_l1 * (boxes[:, :, None] - target_boxes[:, None]).abs().sum(-1)
    return cost - of_giou * generalised_iou(corners(boxes)[:, :, None], corners(target_boxes)[:, None])


def matched_queries(
    logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor, *, terms: tuple[float, float, float]
) -> Tensor:
    """The query that answers for each target, int64 (batch, targets); -1 for none (IGNORED_LABEL). No gradient.

    Shapes as in `matching_cost`; what is no number is matched last. Raises ConfigError for more targets than
    queries, and for a label that the logits do not have.
    """
    answer: Tensor = _Matching.apply(logits, boxes, target_labels, target_boxes, terms)  # type: ignore[no-untyped-call]
    return answer


class _Matching(torch.autograd.Function):
    """One function to whoever watches a forward: it looks at values, and nothing behind it has to."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        boxes: Tensor,
        target_labels: Tensor,
        target_boxes: Tensor,
        terms: tuple[float, float, float],
    ) -> Tensor:
        _check(target_labels, num_queries=logits.shape[1], num_classes=logits.shape[2] - 1)
        cost = matching_cost(logits.float(), boxes.float(), target_labels, target_boxes.float(), terms=terms)
        from scipy.optimize import linear_sum_assignment  # a fifth of a second, which no other task should wait for

        counted = target_labels != IGNORED_LABEL
        rows = torch.full_like(target_labels, -1, device="cpu")
        costs, present = np.nan_to_num(cost.cpu().numpy(), nan=_WORST), counted.cpu().numpy()
        for image, own in enumerate(present):
            (targets,) = own.nonzero()
            ties = _TIE * np.outer(np.arange(costs.shape[1]), np.arange(1, len(targets) + 1))
            queries, places = linear_sum_assignment(costs[image][:, targets] + ties)
            rows[image, torch.from_numpy(targets[places])] = torch.from_numpy(queries)
        matched = rows.to(target_labels.device)
        ctx.mark_non_differentiable(matched)
        return matched

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * 5


def _check(labels: Tensor, *, num_queries: int, num_classes: int) -> None:
    """(batch, targets)"""
    if labels.shape[1] > num_queries:
        raise ConfigError(
            f"every box is matched with a query of its own, but an image has up to {labels.shape[1]} boxes and the "
            f"model {num_queries} queries; give it at least {labels.shape[1]} (num_detection_tokens, num_queries)"
        )
    label = int(labels.max()) if labels.numel() else IGNORED_LABEL
    if label >= num_classes:
        raise ConfigError(
            f"a detector has a logit for every class and one for none, but this one has {num_classes + 1} and a box is "
            f"of class {label}; give it at least {label + 2} (num_labels, id2label)"
        )
