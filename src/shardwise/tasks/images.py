"""Image classification: a class for every image, and the share of held-out images that get theirs.

    file ──once──► uint8 in one array ──a step──► shifted and flipped by (seed, step, sample) ──► normalised float32

It knows pixels, classes and what may be done to an image; it refuses to know models, ranks and micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.cache import content_key, filled_folder
from shardwise.tasks.head import ModelHead
from shardwise.tasks.image_files import Images, named_classes, read_images
from shardwise.tasks.mixing import UInts, derive_keys, mix
from shardwise.tasks.scored import Answers, Score
from shardwise.tasks.task import SPLITS, Batch, Split, check_indices, class_loss, label_count, logits_of

__all__ = ["FAMILY", "Augment", "ImageClassification", "ImageOptions"]

FAMILY = "AutoModelForImageClassification"

_FORMAT = "images-1"  # a new number makes cached pixels of older versions unused
_SUMMARY_FILE = "images.json"


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to a training image: flipped left to right half of the time, shifted by at most so many pixels."""

    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ConfigError(f"an image is shifted by so many pixels at most, but shift={self.shift}; use 0 or more")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What to read, as in `read_images`, and what is done to training images; `classes` are names for those of idx
    files."""

    cache: str
    data: str
    size: int = 0  # pixels of an image file's side
    channels: int = 0  # of image files; 3 if not given
    classes: tuple[str, ...] = ()
    flip: bool = False
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class ImageSummary:
    """What is known of prepared images; mean and deviation of training pixels by channel, of pixels in [0, 1]."""

    fingerprint: str
    names: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageClassification:
    """A task over a prepared folder. Memory-mapped; pickles as its path."""

    counts: ClassVar[str] = "images"  # see `Counted`

    folder: Path
    summary: ImageSummary
    augment: Augment
    pixels: Mapping[Split, NDArray[np.uint8]] = field(repr=False)  # (images, channels, height, width)
    labels: Mapping[Split, NDArray[np.int64]] = field(repr=False)  # (images,)

    @staticmethod
    def prepare(options: ImageOptions) -> Path:
        """Read and store; returns the folder to `open`. Raises ConfigError for data that are no images."""
        images = read_images(Path(options.data).expanduser(), size=options.size, channels=options.channels)
        names = named_classes(images["train"], options.classes)
        arrays = [array.tobytes() for split in SPLITS for array in (images[split].pixels, images[split].labels)]
        key = content_key([_FORMAT, *names, str(images["train"].pixels.shape), *arrays])
        return filled_folder(Path(options.cache) / f"images-{key}", _filler(images, names, key)).resolve()

    @classmethod
    def open(cls, folder: Path, *, augment: Augment | None = None) -> ImageClassification:
        """The task over a prepared folder. Raises ConfigError for a folder that `prepare` did not make."""
        try:
            told = json.loads((folder / _SUMMARY_FILE).read_text(encoding="utf-8"))
            lists = {name: tuple(told[name]) for name in ("names", "mean", "deviation")}
            summary = ImageSummary(fingerprint=told["fingerprint"], **lists)
            pixels, labels = (
                {s: np.load(folder / f"{s}-{name}.npy", mmap_mode="r", allow_pickle=False) for s in SPLITS}
                for name in ("pixels", "labels")
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"images are opened from a folder that was prepared; {folder} holds none ({error}); prepare it first"
            ) from error
        return cls(folder=folder, summary=summary, augment=augment or Augment(), pixels=pixels, labels=labels)

    def num_samples(self, split: Split) -> int:
        """Images of a split."""
        return len(self.labels[split])

    def head(self) -> ModelHead:
        """A class for every name; channels and size for a model that has no values yet."""
        names = dict(enumerate(self.summary.names))
        _, channels, height, width = self.pixels["train"].shape
        size = height if height == width else (height, width)
        return ModelHead(
            family=FAMILY,
            config={"id2label": names, "label2id": {name: label for label, name in names.items()}},
            inputs={"num_channels": channels, "image_size": size},
        )

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        """`pixel_values`, float32 (len(indices), channels, height, width), and `labels`, int64 (len(indices),)."""
        check_indices(indices, num_samples=self.num_samples(split), split=split)
        return self._batch(self.pixels[split][list(indices)], indices, split)

    def augmented(self, indices: Sequence[int], *, seed: int, step: int) -> dict[str, Tensor]:
        """Training samples as a step sees them; an image depends on (seed, step, its number) alone."""
        check_indices(indices, num_samples=self.num_samples("train"), split="train")
        pixels = self.pixels["train"][list(indices)]
        if self.augment != Augment():
            pixels = _augmented(pixels, indices, self.augment, keys=derive_keys("augment", seed, step))
        return self._batch(pixels, indices, "train")

    def loss(self, outputs: object, batch: Batch) -> Tensor:
        """The model's own loss, else cross entropy of its logits (batch, classes); nats per image, scalar."""
        return class_loss(outputs, batch)

    def weight(self, batch: Batch) -> float:
        """Images."""
        return label_count(batch)

    def metrics(self, loss: float) -> dict[str, float]:
        """None: figures come from `score`."""
        return {}

    def answers(self, outputs: object, batch: Batch) -> dict[str, Tensor]:
        """`labels`: the best class, int32 (batch,)."""
        return {"labels": logits_of(outputs).argmax(-1).to(torch.int32)}

    def score(self, answers: Answers, indices: Sequence[int], split: Split) -> Score:
        """`accuracy`: the share of images whose best class is theirs; the report has a line a class."""
        found = torch.stack(list(answers["labels"])).numpy()
        true = self.labels[split][list(indices)]
        right = found == true
        lines = [f"{'class':<16} accuracy  images"]
        for label, name in enumerate(self.summary.names):
            of_class = true == label
            if of_class.any():
                lines.append(f"{name:<16}   {right[of_class].mean():.4f}  {of_class.sum():6d}")
        return Score(figures={"accuracy": float(right.mean())}, report="\n".join(lines))

    def _batch(self, pixels: NDArray[np.uint8], indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        mean, deviation = (
            np.array(v, dtype=np.float32)[:, None, None] for v in (self.summary.mean, self.summary.deviation)
        )
        values = (pixels.astype(np.float32) / np.float32(255) - mean) / deviation
        labels = np.asarray(self.labels[split][list(indices)], dtype=np.int64)
        return {"pixel_values": torch.from_numpy(values), "labels": torch.from_numpy(labels)}

    def __reduce__(self) -> tuple[Callable[[str, Augment], ImageClassification], tuple[str, Augment]]:
        return _reopened, (str(self.folder), self.augment)


def _reopened(folder: str, augment: Augment) -> ImageClassification:
    return ImageClassification.open(Path(folder), augment=augment)


def _augmented(
    pixels: NDArray[np.uint8], indices: Sequence[int], augment: Augment, *, keys: UInts
) -> NDArray[np.uint8]:
    """(batch, channels, height, width); what comes in from beyond an edge is 0."""
    numbers: UInts = np.array(indices, dtype=np.uint64)
    height, width = pixels.shape[2:]
    shift, side = augment.shift, np.uint64(2 * augment.shift + 1)
    down, right, turned = (mix(mix(numbers + keys[i]) ^ keys[i]) >> np.uint64(11) for i in range(3))
    wide = np.pad(pixels, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    made = np.empty_like(pixels)
    for place in range(len(pixels)):
        top, left = int(down[place] % side), int(right[place] % side)
        image = wide[place, :, top : top + height, left : left + width]
        made[place] = image[:, :, ::-1] if augment.flip and turned[place] % np.uint64(2) else image
    return made


def _filler(images: Mapping[Split, Images], names: Sequence[str], key: str) -> Callable[[Path], None]:
    """A function that writes pixels, labels and summary into an empty folder."""

    def fill(folder: Path) -> None:
        pixels = images["train"].pixels
        count = pixels.size / pixels.shape[1]
        total = pixels.sum(axis=(0, 2, 3), dtype=np.float64)
        square = np.array([np.bincount(pixels[:, c].ravel(), minlength=256) @ np.arange(256.0) ** 2
                           for c in range(pixels.shape[1])])  # fmt: skip
        mean = total / count
        deviation = np.sqrt(np.maximum(square / count - mean**2, 1.0))
        for split in SPLITS:
            np.save(folder / f"{split}-pixels.npy", images[split].pixels)
            np.save(folder / f"{split}-labels.npy", images[split].labels)
        summary = ImageSummary(
            fingerprint=key,
            names=tuple(names),
            mean=tuple((mean / 255).tolist()),
            deviation=tuple((deviation / 255).tolist()),
        )
        (folder / _SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")

    return fill
