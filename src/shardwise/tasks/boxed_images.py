"""Images with boxes: a folder of images and an annotations.json as COCO has them.

    train/annotations.json   train/*.jpg            val/annotations.json   val/*.jpg   (or valid, dev, test)
    annotations/instances_train2017.json   train2017/*.jpg        …val2017…             as COCO itself is laid out

An image is scaled to fit a square, at its top left, black beside it. It knows files and pixels; it refuses to
know what is done with boxes. All images of a split are held in memory while they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.canvases import Scene
from shardwise.tasks.image_files import whole_pixels
from shardwise.tasks.task import IGNORED_LABEL, Split

__all__ = ["BoxedImages", "read_boxed_images"]

_FOLDERS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "held_out": ("val", "valid", "dev", "test")}
_FILES = ("annotations.json", "_annotations.coco.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxedImages:
    """Pixels uint8 (images, channels, size, size); boxes float32 (images, most, 4), left, top, right, bottom in pixels;
    labels int64 (images, most), IGNORED_LABEL where an image has no more boxes."""

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def num(self) -> int:
        """Images."""
        return len(self.pixels)

    @property
    def most(self) -> int:
        """Boxes of an image, at most."""
        return int(self.boxes.shape[1])

    def scene(self, number: int) -> Scene:
        """An image and its boxes."""
        own = self.labels[number] != IGNORED_LABEL
        return Scene(pixels=self.pixels[number], boxes=self.boxes[number, own], labels=self.labels[number, own])


def read_boxed_images(data: Path, *, size: int, channels: int) -> tuple[dict[Split, BoxedImages], tuple[str, ...]]:
    """Both splits of a folder, scaled to `size` x `size`, and the names of the classes, by the ids of their categories.
    Crowds (iscrowd) and boxes without area are left out.

    Raises ConfigError for a folder without annotations, and for files that are damaged or do not fit each other.
    """
    found = {split: _annotations(data, names) for split, names in _FOLDERS.items()}
    train, held_out = found["train"], found["held_out"]
    if train is None or held_out is None:
        raise ConfigError(
            f"{data} has neither train-images-idx3-ubyte, to compose canvases of, nor train/annotations.json and "
            "val/annotations.json, as COCO has them; correct task.data"
        )
    if size < 1:
        raise ConfigError(
            f"images of {data} are files of any size, which are scaled to one; set task.size, such as 512"
        )
    told = {split: _read(file) for split, file in (("train", train), ("held_out", held_out))}
    names = {c["id"]: str(c["name"]) for each in told.values() for c in each.categories}
    numbers = {category: label for label, category in enumerate(sorted(names))}
    folders: dict[Split, tuple[Path, Path]] = {"train": train, "held_out": held_out}
    read = {
        split: _images(folder, told[split], numbers, size=size, channels=channels or 3)
        for split, (_, folder) in folders.items()
    }
    return read, tuple(names[category] for category in sorted(names))


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What an annotations.json says."""

    file: Path
    images: Sequence[Mapping[str, Any]]
    categories: Sequence[Mapping[str, Any]]
    boxes: Mapping[object, Sequence[Mapping[str, Any]]]  # image -> its annotations


def _annotations(data: Path, names: Sequence[str]) -> tuple[Path, Path] | None:
    """The file of a split and the folder its images are in."""
    for name in names:
        for file in (data / name / each for each in _FILES):
            if file.is_file():
                images = data / name / "images"
                return file, images if images.is_dir() else data / name
        for file in sorted((data / "annotations").glob(f"instances_{name}*.json")):
            return file, data / file.stem.removeprefix("instances_")
    return None


def _read(found: tuple[Path, Path]) -> _Told:
    file = found[0]
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        boxes: dict[object, list[Mapping[str, Any]]] = {image["id"]: [] for image in told["images"]}
        known = {category["id"] for category in told["categories"]}
        for each in told["annotations"]:
            if each["category_id"] not in known or each["image_id"] not in boxes or len(each["bbox"]) != 4:
                raise ValueError(f"annotation {each.get('id')} is of no image or category, or its box is no 4 numbers")
            if not each.get("iscrowd"):
                boxes[each["image_id"]].append(each)
        return _Told(file=file, images=told["images"], categories=told["categories"], boxes=boxes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is a COCO file with images, categories and annotations, but {type(error).__name__}: {error}; "
            "correct it"
        ) from error


def _images(folder: Path, told: _Told, numbers: Mapping[object, int], *, size: int, channels: int) -> BoxedImages:
    if not told.images:
        raise ConfigError(f"{told.file} tells of no image; give some")
    most = max(1, *(len(each) for each in told.boxes.values()))
    pixels = np.zeros((len(told.images), channels, size, size), dtype=np.uint8)
    boxes = np.zeros((len(told.images), most, 4), dtype=np.float32)
    labels = np.full((len(told.images), most), IGNORED_LABEL, dtype=np.int64)
    for row, image in enumerate(told.images):
        pixels[row], scale = whole_pixels(folder / str(image["file_name"]), size=size, channels=channels)
        place = 0
        for each in told.boxes[image["id"]]:
            left, top, width, height = (float(number) * scale for number in each["bbox"])
            corners = np.array([left, top, left + width, top + height]).clip(0, size)
            if (corners[2:] > corners[:2]).all():
                boxes[row, place], labels[row, place] = corners, numbers[each["category_id"]]
                place += 1
    return BoxedImages(pixels=pixels, boxes=boxes, labels=labels)
