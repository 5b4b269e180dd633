"""Images with boxes: a folder of images and an annotations.json as COCO has them.

    train/annotations.json   train/*.jpg            val/annotations.json   val/*.jpg   (or valid, dev, test)
    annotations/instances_train2017.json   train2017/*.jpg        …val2017…             as COCO itself is laid out

An image is scaled to fit a square, at its top left, black beside it. Images are read one by one, into a file. It knows
files and pixels; it refuses to know what is done with boxes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.canvases import Scene
from shardwise.tasks.image_files import whole_pixels
from shardwise.tasks.task import IGNORED_LABEL, Split

__all__ = ["Annotated", "BoxedImages", "read_annotations"]

_FOLDERS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "held_out": ("val", "valid", "dev", "test")}
_FILES = ("annotations.json", "_annotations.coco.json")


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """Image files, and for each its boxes, (left, top, width, height) in pixels, with their labels. Crowds (iscrowd)
    and boxes without area are left out."""

    files: tuple[Path, ...]
    boxes: tuple[tuple[tuple[tuple[float, ...], int], ...], ...]

    def told(self) -> Iterator[str]:
        """All that the stored images follow from, file by file; a file is told by its name, size and time."""
        for file, boxes in zip(self.files, self.boxes, strict=True):
            try:
                found = file.stat()
            except OSError as error:
                raise ConfigError(f"an annotation is of {file}, but {error}; fetch it, or take it out") from error
            yield f"{file.name} {found.st_size} {found.st_mtime_ns} {boxes}"

    def store(self, folder: Path, split: Split, *, size: int, channels: int) -> None:
        """Write the arrays of `BoxedImages`, images scaled to `size` x `size`. Raises ConfigError for a file that is no
        image."""
        shapes = (len(self.files), channels, size, size), (len(self.files), max(1, *map(len, self.boxes)), 4)
        pixels = open_memmap(folder / f"{split}-pixels.npy", mode="w+", dtype=np.uint8, shape=shapes[0])
        boxes = np.zeros(shapes[1], dtype=np.float32)
        labels = np.full(shapes[1][:2], IGNORED_LABEL, dtype=np.int64)
        for row, (file, own) in enumerate(zip(self.files, self.boxes, strict=True)):
            pixels[row], scale = whole_pixels(file, size=size, channels=channels)
            for place, ((left, top, width, height), label) in enumerate(own):
                corners = np.array([left, top, left + width, top + height]) * scale
                boxes[row, place], labels[row, place] = corners.clip(0, size), label
        pixels.flush()
        np.save(folder / f"{split}-boxes.npy", boxes)
        np.save(folder / f"{split}-labels.npy", labels)


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


def read_annotations(data: Path) -> tuple[dict[Split, Annotated], tuple[str, ...]]:
    """Both splits of a folder, and the names of the classes, in the order of their categories' ids.

    Raises ConfigError for a folder without annotations, and for those that are damaged or do not fit each other.
    """
    found = {split: _annotations(data, names) for split, names in _FOLDERS.items()}
    train, held_out = found["train"], found["held_out"]
    if train is None or held_out is None:
        raise ConfigError(
            f"{data} has neither train-images-idx3-ubyte, to compose canvases of, nor train/annotations.json and "
            "val/annotations.json, as COCO has them; correct task.data"
        )
    told: dict[Split, _Told] = {"train": _read(*train), "held_out": _read(*held_out)}
    names = {category["id"]: str(category["name"]) for each in told.values() for category in each.categories}
    numbers = {category: label for label, category in enumerate(sorted(names))}
    return {split: each.annotated(numbers) for split, each in told.items()}, tuple(names[c] for c in sorted(names))


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What an annotations.json says."""

    folder: Path
    images: Sequence[Mapping[str, Any]]
    categories: Sequence[Mapping[str, Any]]
    boxes: Mapping[object, Sequence[Mapping[str, Any]]]  # image -> its annotations

    def annotated(self, numbers: Mapping[object, int]) -> Annotated:
        """The same, with the labels of categories."""
        boxes = tuple(
            tuple((tuple(map(float, each["bbox"])), numbers[each["category_id"]]) for each in self.boxes[image["id"]])
            for image in self.images
        )
        return Annotated(files=tuple(self.folder / str(image["file_name"]) for image in self.images), boxes=boxes)


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


def _read(file: Path, folder: Path) -> _Told:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        boxes: dict[object, list[Mapping[str, Any]]] = {image["id"]: [] for image in told["images"]}
        known = {category["id"] for category in told["categories"]}
        for each in told["annotations"]:
            if each["category_id"] not in known or each["image_id"] not in boxes or len(each["bbox"]) != 4:
                raise ValueError(f"annotation {each.get('id')} is of no image or category, or its box is no 4 numbers")
            if not each.get("iscrowd") and min(map(float, each["bbox"][2:])) > 0:
                boxes[each["image_id"]].append(each)
        if not boxes:
            raise ValueError("it tells of no image")
        return _Told(folder=folder, images=told["images"], categories=told["categories"], boxes=boxes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is a COCO file with images, categories and annotations, but {type(error).__name__}: {error}; "
            "correct it"
        ) from error
