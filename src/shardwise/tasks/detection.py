"""Object detection: boxes and their classes in an image, and the mean average precision of those that are found.

    idx files    items ──composed by (seed, split, number)──► canvas │
    COCO folder  images and annotations.json ────────────────────────┴─► pixels, boxes, labels ──► a set loss, mAP

Targets are padded to as many boxes as an image has at most, so that a batch is tensors. The model is given pixels
alone: its own loss, if it has one, is not computed. It refuses to know models, ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.box_score import Boxes, box_score
from shardwise.tasks.boxed_images import BoxedImages, read_annotations
from shardwise.tasks.boxes import corners
from shardwise.tasks.cache import content_key, filled_folder
from shardwise.tasks.canvases import Canvases, CanvasOptions, Scene
from shardwise.tasks.head import ModelHead
from shardwise.tasks.image_files import has_idx, named_classes, read_images
from shardwise.tasks.scored import Answers, Score
from shardwise.tasks.set_loss import SetLoss, boxes_of
from shardwise.tasks.task import IGNORED_LABEL, SPLITS, Batch, Split, batch_size, check_indices, logits_of

__all__ = ["FAMILY", "Detection", "DetectionOptions", "PreparedDetection"]

FAMILY = "AutoModelForObjectDetection"

_FORMAT = "boxes-1"  # a new number makes cached pixels of older versions unused
_LOOKED_AT = 512  # scenes whose pixels and boxes give means
_MOST_ANSWERS = 100  # of an image, as COCO counts them


class Scenes(Protocol):
    """Images of a split, with boxes."""

    @property
    def num(self) -> int: ...

    @property
    def most(self) -> int: ...

    def scene(self, number: int) -> Scene: ...


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """What to read, and what the loss weighs.

    `data` is a folder with idx files, of whose images canvases are composed (`train_canvases` and `held_out_canvases`
    of `size` pixels a side, and as `CanvasOptions` says), or a COCO folder, whose images are scaled to `size`.
    `classes` are names for those of idx files. The terms are those of `SetLoss`.
    """

    cache: str
    data: str
    size: int = 0
    channels: int = 0  # of image files; 3 if not given
    classes: tuple[str, ...] = ()
    train_canvases: int = 20_000
    held_out_canvases: int = 1_000
    items: int = 4
    smallest: int = 18
    largest: int = 32
    overlap: float = 0.15
    seed: int = 0
    class_term: float = 1.0
    l1_term: float = 5.0
    giou_term: float = 2.0
    no_object: float = 0.1

    def __post_init__(self) -> None:
        if min(self.train_canvases, self.held_out_canvases) < 1:
            raise ConfigError(
                "a split has at least one canvas, but "
                f"train_canvases={self.train_canvases}, held_out_canvases={self.held_out_canvases}; use 20000 and 1000"
            )
        self.set_loss(1.0)  # refused before anything is read

    def canvas(self) -> CanvasOptions:
        """How canvases look. Raises ConfigError for items that do not fit."""
        return CanvasOptions(
            size=self.size or 64,
            items=self.items,
            smallest=self.smallest,
            largest=self.largest,
            overlap=self.overlap,
            seed=self.seed,
        )

    def set_loss(self, per_image: float) -> SetLoss:
        """The loss. Raises ConfigError for terms that are negative."""
        terms = {name: getattr(self, name) for name in ("class_term", "l1_term", "giou_term", "no_object")}
        return SetLoss(**terms, per_image=per_image)


@dataclass(frozen=True, kw_only=True)
class PreparedDetection:
    """What a rank needs to open prepared images with boxes; mean and deviation by channel, of pixels in [0, 1]."""

    folder: str
    names: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    loss: SetLoss
    canvas: CanvasOptions | None = None  # None: images have boxes of their own
    train_canvases: int = 0
    held_out_canvases: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """A task over a prepared folder. Memory-mapped; pickles as what it was prepared to."""

    counts: ClassVar[str] = "images"  # see `Counted`

    prepared: PreparedDetection
    scenes: Mapping[Split, Scenes] = field(repr=False)

    @staticmethod
    def prepare(options: DetectionOptions) -> PreparedDetection:
        """Read and store. Raises ConfigError for data that are neither items nor images with boxes."""
        data = Path(options.data).expanduser()
        if not data.is_dir():
            raise ConfigError(f"task.data is a folder of images, but {data} is none; correct the path")
        canvas = options.canvas() if has_idx(data) else None
        source = _items(data, options) if canvas else _boxed(data, options)
        key = content_key([_FORMAT, *source.told])
        folder = filled_folder(Path(options.cache) / f"boxes-{key}", source.store).resolve()
        counts = {"train_canvases": options.train_canvases, "held_out_canvases": options.held_out_canvases}
        mean, deviation, per_image = _seen(_scenes(folder, "train", canvas, counts))
        return PreparedDetection(
            folder=str(folder),
            names=source.names,
            mean=mean,
            deviation=deviation,
            loss=options.set_loss(per_image),
            canvas=canvas,
            **counts if canvas else {},
        )

    @classmethod
    def open(cls, prepared: PreparedDetection) -> Detection:
        """The task over a prepared folder. Raises ConfigError for a folder that `prepare` did not make."""
        folder = Path(prepared.folder)
        counts = {"train_canvases": prepared.train_canvases, "held_out_canvases": prepared.held_out_canvases}
        try:
            scenes = {split: _scenes(folder, split, prepared.canvas, counts) for split in SPLITS}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"images with boxes are opened from a folder that was prepared; {folder} holds none ({error}); prepare "
                "it first"
            ) from error
        return cls(prepared=prepared, scenes=scenes)

    def num_samples(self, split: Split) -> int:
        """Images of a split."""
        return self.scenes[split].num

    def head(self) -> ModelHead:
        """A class for every name; channels and size for a model that has no values yet."""
        names = dict(enumerate(self.prepared.names))
        _, height, width = self.scenes["train"].scene(0).pixels.shape
        return ModelHead(
            family=FAMILY,
            config={"id2label": names, "label2id": {name: label for label, name in names.items()}},
            inputs={"num_channels": len(self.prepared.mean), "image_size": [height, width]},
        )

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        """`pixel_values`, float32 (images, channels, size, size); `target_labels`, int64 (images, boxes),
        IGNORED_LABEL for no box; `target_boxes`, float32 (images, boxes, 4), middle and size in shares of the image, 0
        for no box."""
        check_indices(indices, num_samples=self.num_samples(split), split=split)
        scenes = [self.scenes[split].scene(index) for index in indices]
        most, channels = self.scenes[split].most, len(self.prepared.mean)
        mean, deviation = (
            np.array(v, dtype=np.float32)[:, None, None] for v in (self.prepared.mean, self.prepared.deviation)
        )
        labels = np.full((len(scenes), most), IGNORED_LABEL, dtype=np.int64)
        boxes = np.zeros((len(scenes), most, 4), dtype=np.float32)
        for row, scene in enumerate(scenes):
            own = len(scene.labels)
            labels[row, :own], boxes[row, :own] = scene.labels, _middles(scene)
        pixels = np.stack([s.pixels for s in scenes]) if scenes else np.empty((0, channels, 1, 1), dtype=np.uint8)
        values = (pixels.astype(np.float32) / np.float32(255) - mean) / deviation
        made = {"pixel_values": values, "target_labels": labels, "target_boxes": boxes}
        return {name: torch.from_numpy(array) for name, array in made.items()}

    def loss(self, outputs: object, batch: Batch) -> Tensor:
        """The set loss of logits (batch, queries, classes + 1) and pred_boxes (batch, queries, 4); scalar, about that
        of one box."""
        return self.prepared.loss.of(outputs, batch["target_labels"], batch["target_boxes"])

    def weight(self, batch: Batch) -> float:
        """Images: also those without a box count."""
        return float(batch_size(batch))

    def about(self) -> str:
        """How many boxes, of how many classes."""
        return f"{self.prepared.loss.per_image:.2f} boxes an image on average, of {len(self.prepared.names)} classes"

    def metrics(self, loss: float) -> dict[str, float]:
        """None: figures come from `score`."""
        return {}

    def answers(self, outputs: object, batch: Batch) -> dict[str, Tensor]:
        """The surest (query, class) pairs of each image: `boxes`, float32 (batch, found, 4), left, top, right,
        bottom in shares of the image; `labels`, int32, and `scores`, float32, (batch, found)."""
        chances = logits_of(outputs).float().softmax(-1)[..., :-1]  # (batch, queries, classes)
        found = corners(boxes_of(outputs).float())  # (batch, queries, 4)
        num_classes = chances.shape[-1]
        flat = chances.flatten(1)
        scores, places = flat.topk(min(_MOST_ANSWERS, flat.shape[1]), dim=1)
        queries = (places // num_classes)[..., None].expand(-1, -1, 4)
        return {
            "boxes": found.gather(1, queries),
            "labels": (places % num_classes).to(torch.int32),
            "scores": scores,
        }

    def score(self, answers: Answers, indices: Sequence[int], split: Split) -> Score:
        """`map`, `map_50` and `map_75` as COCO counts them, and a report per class (pycocotools)."""
        true: list[Boxes] = []
        found: list[Boxes] = []
        for row, index in enumerate(indices):
            scene = self.scenes[split].scene(index)
            height, width = scene.pixels.shape[1:]
            pixels = np.array([width, height, width, height], dtype=np.float64)
            own = {name: answers[name][row].numpy().astype(np.float64) for name in ("boxes", "labels", "scores")}
            true.append(Boxes(corners=scene.boxes.astype(np.float64), labels=scene.labels))
            found.append(
                Boxes(corners=own["boxes"] * pixels, labels=own["labels"].astype(np.int64), scores=own["scores"])
            )
        return box_score(true, found, self.prepared.names)

    def __reduce__(self) -> tuple[Callable[[PreparedDetection], Detection], tuple[PreparedDetection]]:
        return Detection.open, (self.prepared,)


def _middles(scene: Scene) -> NDArray[np.float32]:
    """(boxes, 4): middle and size in shares of the image."""
    height, width = scene.pixels.shape[1:]
    left, top, right, bottom = (scene.boxes / np.array([width, height, width, height], dtype=np.float32)).T
    return np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], axis=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Source:
    """What is stored: what it follows from, how it is written into an empty folder, names of the classes."""

    told: Iterable[str | bytes]
    store: Callable[[Path], None]
    names: tuple[str, ...]


def _items(data: Path, options: DetectionOptions) -> _Source:
    """Images that canvases are composed of."""
    read = read_images(data, size=0, channels=options.channels)
    arrays = {f"{s}-{kind}": getattr(read[s], kind) for s in SPLITS for kind in ("pixels", "labels")}

    def store(folder: Path) -> None:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)

    told = [part for name, array in arrays.items() for part in (name, str(array.shape), array.tobytes())]
    return _Source(told=told, store=store, names=named_classes(read["train"], options.classes))


def _boxed(data: Path, options: DetectionOptions) -> _Source:
    """Images that have boxes."""
    read, names = read_annotations(data)
    if options.size < 1:
        raise ConfigError(f"images of {data} are files of any size, which are scaled to one; set task.size, as 512")
    shape = {"size": options.size, "channels": options.channels or 3}

    def store(folder: Path) -> None:
        for split in SPLITS:
            read[split].store(folder, split, **shape)

    told = [str(shape), *names, *(line for split in SPLITS for line in (split, *read[split].told()))]
    return _Source(told=told, store=store, names=names)


def _scenes(folder: Path, split: Split, canvas: CanvasOptions | None, counts: Mapping[str, int]) -> Scenes:
    """A split of a prepared folder, mapped into memory. Raises OSError and ValueError."""
    kinds = ("pixels", "labels") if canvas else ("pixels", "labels", "boxes")
    arrays = {kind: np.load(folder / f"{split}-{kind}.npy", mmap_mode="r", allow_pickle=False) for kind in kinds}
    if canvas is None:
        return BoxedImages(**arrays)
    return Canvases(**arrays, num=counts[f"{split}_canvases"], split=split, options=canvas)


def _seen(scenes: Scenes) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Mean and deviation of pixels in [0, 1] by channel, and boxes of an image, of the first scenes."""
    first = [scenes.scene(number) for number in range(min(scenes.num, _LOOKED_AT))]
    pixels = np.stack([scene.pixels for scene in first]) / 255.0
    mean, deviation = pixels.mean(axis=(0, 2, 3)), np.maximum(pixels.std(axis=(0, 2, 3)), 1 / 255)
    boxes = sum(len(scene.labels) for scene in first) / len(first)
    return tuple(mean.tolist()), tuple(deviation.tolist()), max(boxes, 1.0)
