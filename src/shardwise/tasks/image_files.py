"""Images with a class: idx files as MNIST and Fashion-MNIST have them, and folders with a folder a class.

    idx       train-images-idx3-ubyte[.gz]  train-labels-idx1-ubyte[.gz]  t10k-images-…  t10k-labels-…
    folders   train/CLASS/*.png  and  val/CLASS/*.png (or valid, dev, test)

It knows files; it refuses to know what is done with pixels. All images of a split are held in memory.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.task import Split

__all__ = ["Images", "has_idx", "named_classes", "read_idx", "read_images", "whole_pixels"]

_IDX: Mapping[Split, str] = {"train": "train", "held_out": "t10k"}
_FOLDERS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "held_out": ("val", "valid", "dev", "test")}
_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"))
_UNSIGNED_BYTES = 0x08  # the type of an idx file's numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Pixels uint8 (images, channels, height, width), and the class of each, int64 (images,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]  # of the classes


def read_images(data: Path, *, size: int, channels: int) -> dict[Split, Images]:
    """Both splits of a folder; image files are scaled to `size` x `size` about their middle, with so many channels.

    Raises ConfigError for a folder that has neither idx files nor classes, and for files that are damaged.
    """
    if not data.is_dir():
        raise ConfigError(f"task.data is a folder of images, but {data} is none; correct the path")
    if has_idx(data):
        return {split: _of_idx(data, name) for split, name in _IDX.items()}
    found = {split: next((data / name for name in names if (data / name).is_dir()), None)
             for split, names in _FOLDERS.items()}  # fmt: skip
    train, held_out = found["train"], found["held_out"]
    if train is None or held_out is None:
        raise ConfigError(
            f"{data} has neither train-images-idx3-ubyte, as MNIST has, nor folders train and val with one a class; "
            "correct task.data"
        )
    if size < 1:
        raise ConfigError(
            f"images of {data} are files of any size, which are scaled to one; set task.size, such as 224"
        )
    names = tuple(sorted(folder.name for folder in train.iterdir() if folder.is_dir()))
    folders: dict[Split, Path] = {"train": train, "held_out": held_out}
    return {split: _of_folder(folder, names, size, channels or 3) for split, folder in folders.items()}


def named_classes(images: Images, names: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes: `names`, else the images' own. Raises ConfigError for fewer than there are classes."""
    if names and len(names) < len(images.names):
        raise ConfigError(
            f"every class has a name, but there are {len(images.names)} classes and classes names {len(names)}; name "
            "them all, or none"
        )
    return tuple(names) or images.names


def has_idx(data: Path) -> bool:
    """Whether a folder has idx files as MNIST does."""
    return any(data.glob("train-images-idx3-ubyte*"))


def read_idx(file: Path) -> NDArray[np.uint8]:
    """The array in an idx file, gzipped or not. Raises ConfigError for another one, or one that is cut off.

    Format: two zeros, the type, the number of dims, each dim as a big-endian int32, the numbers (Y. LeCun, MNIST).
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            data = opened.read()
        zeros, kind, num_dims = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{num_dims}I", data, 4)
        if zeros != 0 or kind != _UNSIGNED_BYTES:
            raise ValueError("its numbers are no unsigned bytes")
        return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * num_dims).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise ConfigError(f"{file} is an idx file, but {error}; fetch it again") from error


def _of_idx(data: Path, name: str) -> Images:
    pixels, labels = (read_idx(_one(data, f"{name}-{what}-ubyte")) for what in ("images-idx3", "labels-idx1"))
    if len(pixels) != len(labels):
        raise ConfigError(
            f"every image has a label, but {data} has {len(pixels)} images and {len(labels)} labels of {name}; fetch "
            "them again"
        )
    names = tuple(map(str, range(int(labels.max(initial=0)) + 1)))
    return Images(pixels=pixels[:, None], labels=labels.astype(np.int64), names=names)


def _one(data: Path, name: str) -> Path:
    files = [data / name, data / f"{name}.gz"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(f"{data} has no {name}, nor {name}.gz; fetch it")
    return file


def _of_folder(folder: Path, names: tuple[str, ...], size: int, channels: int) -> Images:
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        for file in sorted((folder / name).rglob("*")):
            if file.suffix.lower() in _SUFFIXES:
                pixels.append(_pixels(file, size, channels))
                labels.append(label)
    if not pixels:
        raise ConfigError(f"{folder} has no image in a folder of a class; give files {', '.join(sorted(_SUFFIXES))}")
    return Images(pixels=np.stack(pixels), labels=np.array(labels, dtype=np.int64), names=names)


def whole_pixels(file: Path, *, size: int, channels: int) -> tuple[NDArray[np.uint8], float]:
    """An image file scaled to fit a square, at its top left, black beside it: pixels (channels, size, size), and how
    many of them stand for one of the file's. Raises ConfigError for a file that is no image."""
    _, ops = _pillow()
    pixels, own = _opened(file, channels, lambda opened: ops.pad(opened, (size, size), centering=(0, 0)))
    return pixels, size / max(own)


def _pixels(file: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """(channels, size, size)"""
    _, ops = _pillow()
    return _opened(file, channels, lambda opened: ops.fit(opened, (size, size)))[0]


def _opened(file: Path, channels: int, to_size: Callable[[Any], Any]) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Pixels (channels, height, width) of what `to_size` makes of an image, and the image's own width and height."""
    library, _ = _pillow()
    try:
        with library.open(file) as opened:
            own, image = opened.size, to_size(opened.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is an image, but {error}; take it out") from error
    array: NDArray[np.uint8] = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else array.transpose(2, 0, 1), own


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ConfigError(
            "image files are read by Pillow, which is not installed; run: pip install 'shardwise[tasks]'"
        ) from error
    return Image, ImageOps
