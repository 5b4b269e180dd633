"""Mean average precision of boxes that were found, as COCO counts it. Counted by pycocotools.

It knows boxes, classes and how sure a detector was of them; it refuses to know images and models.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.scored import Score

__all__ = ["Boxes", "box_score"]

_HALF, _THREE_QUARTERS = 0, 5  # among COCO's thresholds of IoU, 0.50 to 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Boxes:
    """Boxes of one image, (boxes, 4): left, top, right, bottom in pixels; class of each, (boxes,), and of found ones
    how sure the detector was, (boxes,)."""

    corners: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64] | None = None


def box_score(true: Sequence[Boxes], found: Sequence[Boxes], names: Sequence[str]) -> Score:
    """`map` (mean over IoU thresholds 0.50 to 0.95 and classes), `map_50` and `map_75`; a report with a line a class.

    `true` and `found` are of the same images. Of an image the 100 boxes of each class count that it was most sure of;
    classes without a true box do not. A figure of nothing is 0. Raises ConfigError where pycocotools is missing.
    """
    coco, evaluation = _libraries()
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        told, guessed = _index(coco, true, names), _index(coco, found, names)
        run = evaluation(told, guessed, "bbox")
        run.evaluate()
        run.accumulate()
    # (thresholds, recalls, classes, areas, most boxes), -1 where a class has no true box: all areas, 100 boxes
    precision = np.asarray(run.eval["precision"])[:, :, :, 0, -1]
    labels = [label for each in true for label in each.labels.tolist()]
    figures = {
        "map": _mean(precision),
        "map_50": _mean(precision[_HALF]),
        "map_75": _mean(precision[_THREE_QUARTERS]),
    }
    wide = max([len("class"), *map(len, names)])
    lines = [f"{'class':<{wide}}     map  map_50   boxes"]
    for label, name in enumerate(names):
        if label in labels:
            own, count = precision[:, :, label], labels.count(label)
            lines.append(f"{name:<{wide}}  {_mean(own):.4f}  {_mean(own[_HALF]):.4f}  {count:6d}")
    return Score(figures=figures, report="\n".join(lines))


def _index(coco: Any, images: Sequence[Boxes], names: Sequence[str]) -> Any:
    """pycocotools' own form of boxes; classes and images count from 1, as a 0 is not found."""
    annotations: list[dict[str, object]] = []
    for number, boxes in enumerate(images, 1):
        scores = np.ones(len(boxes.labels)) if boxes.scores is None else boxes.scores
        for (left, top, right, bottom), label, score in zip(
            boxes.corners.tolist(), boxes.labels.tolist(), scores.tolist(), strict=True
        ):
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": score,
                }
            )
    made = coco()
    made.dataset = {
        "images": [{"id": number} for number in range(1, len(images) + 1)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(names, 1)],
        "annotations": annotations,
    }
    made.createIndex()
    return made


def _mean(precision: NDArray[np.float64]) -> float:
    """Of what is counted; 0 of nothing."""
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else 0.0


def _libraries() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ConfigError(
            "boxes are scored by pycocotools, which is not installed; run: pip install 'shardwise[tasks]'"
        ) from error
    return COCO, COCOeval
