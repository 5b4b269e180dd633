"""Scenes to detect things in, composed of single images: some items at random places and sizes on a dark canvas.

    items 28 x 28         canvas 64 x 64
    ┌──┐ ┌──┐             ┌────────────────┐
    │👕│ │👟│     ──►     │ ┌────┐         │      how many, which, how large and where:
    └──┘ └──┘             │ │ 👕 │    ┌──┐ │      a function of (seed, split, number of the canvas)
                          │ └────┘    │👟│ │
                          └───────────└──┘─┘

Canvas 7 is the same on every machine, whoever asks. It knows pixels and boxes around them; it refuses to know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.mixing import UInts, derive_keys, mix
from shardwise.tasks.task import Split

__all__ = ["CanvasOptions", "Canvases", "Scene"]

_TRIES = 8  # places that an item is tried at before it is left out
_DRAWS = 2 + 2 * _TRIES  # numbers that an item may need
_FAINT = 16  # of 255: darker pixels are no part of an item


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """Pixels uint8 (channels, height, width); boxes float32 (things, 4), left, top, right, bottom in pixels; labels
    int64 (things,)."""

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CanvasOptions:
    """Canvases of `size` x `size` pixels with one to `items` items of `smallest` to `largest` pixels a side, two of
    which share at most `overlap` of the smaller one's box."""

    size: int = 64
    items: int = 4
    smallest: int = 18
    largest: int = 32
    overlap: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.largest <= self.size or self.items < 1:
            raise ConfigError(
                "a canvas has at least one item, and items are no larger than it, but items="
                f"{self.items}, smallest={self.smallest}, largest={self.largest}, size={self.size}; use 4, 18, 32, 64"
            )
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"overlap is a share of a box, 0 to 1, but got {self.overlap}; use 0.15")


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvases:
    """`num` canvases made of items that have pixels, uint8 (items, channels, height, width), and a label each."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    num: int
    split: Split
    options: CanvasOptions

    @property
    def most(self) -> int:
        """Boxes of a canvas, at most."""
        return self.options.items

    def scene(self, number: int) -> Scene:
        """Canvas `number`. An item without a free place is left out, the first one never is."""
        return _composed(self.pixels, self.labels, number, self._keys, self.options)

    @cached_property
    def _keys(self) -> UInts:
        return derive_keys("canvas", self.options.seed, int(self.split == "train"))


def _composed(
    items: NDArray[np.uint8], of_items: NDArray[np.int64], number: int, keys: UInts, options: CanvasOptions
) -> Scene:
    own = mix(np.array([number], dtype=np.uint64) + keys[0])[0]
    count = 1 + int(mix(np.array([own ^ keys[1]]))[0]) % options.items
    drawn = mix(np.arange(count * _DRAWS, dtype=np.uint64) + (own ^ keys[2])) >> np.uint64(11)
    size, channels = options.size, items.shape[1]
    canvas = np.zeros((channels, size, size), dtype=np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for numbers in drawn.reshape(count, _DRAWS).tolist():
        item = numbers[0] % len(items)
        side = options.smallest + numbers[1] % (options.largest - options.smallest + 1)
        pixels = _scaled(items[item], side)
        tight = _tight(pixels)
        if tight is None:
            continue  # nothing is to be seen
        place = _free_place(numbers[2:], tight, size - side + 1, boxes, options.overlap)
        if place is None:
            continue
        top, left = place
        window = canvas[:, top : top + side, left : left + side]
        np.maximum(window, pixels, out=window)
        boxes.append(_moved(tight, top, left))
        labels.append(int(of_items[item]))
    return Scene(
        pixels=canvas,
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
    )


def _free_place(
    numbers: Sequence[int],
    tight: tuple[int, int, int, int],
    places: int,
    boxes: Sequence[tuple[int, int, int, int]],
    most: float,
) -> tuple[int, int] | None:
    """Top and left of the first place tried where a box shares at most `most` with each of `boxes`."""
    for down, right in zip(numbers[::2], numbers[1::2], strict=True):
        top, left = down % places, right % places
        own = _moved(tight, top, left)
        if all(_shared(own, other) <= most * min(_area(own), _area(other)) for other in boxes):
            return top, left
    return None


def _scaled(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(channels, height, width) -> (channels, side, side), linearly between pixels."""
    down, across = (_weights(length, side) for length in image.shape[1:])
    made = np.matmul(np.matmul(down, image.astype(np.float64)), across.T)
    rounded: NDArray[np.uint8] = np.floor(made + (0.5 + 1e-6)).astype(np.uint8)  # halves go up on every machine
    return rounded


@lru_cache(maxsize=256)
def _weights(length: int, side: int) -> NDArray[np.float64]:
    """(side, length): how much of each pixel a scaled one is made of, rows that sum to 1. A pixel of a smaller image is
    the mean of what lies under it."""
    scale = length / side
    middles = (np.arange(side) + 0.5) * scale - 0.5
    reach = max(scale, 1.0)
    near = np.clip(1 - np.abs(np.arange(length)[None] - middles[:, None]) / reach, 0, None)
    weights: NDArray[np.float64] = near / near.sum(1, keepdims=True)
    return weights


def _tight(pixels: NDArray[np.uint8]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom around all that is to be seen, None if that is nothing."""
    seen = np.any(pixels >= _FAINT, axis=0)  # (height, width)
    rows, columns = (np.flatnonzero(np.any(seen, axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _moved(box: tuple[int, int, int, int], top: int, left: int) -> tuple[int, int, int, int]:
    return box[0] + left, box[1] + top, box[2] + left, box[3] + top


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Pixels that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
