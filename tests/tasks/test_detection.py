"""Canvases by (seed, split, number) alone, COCO folders, targets, and mean average precision."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.tasks import Detection, Scored, prepare_task, task_from
from shardwise.tasks.box_score import Boxes, box_score
from shardwise.tasks.canvases import Canvases, CanvasOptions
from tasks.test_images import write_idx

NAMES = ("coat", "bag", "shoe")


def canvases(num: int = 20, split: str = "train", **options: object) -> Canvases:
    """Items 10 x 10 that are a bright frame of 1 pixel in a dark margin of 1."""
    pixels = np.zeros((6, 1, 10, 10), dtype=np.uint8)
    pixels[:, :, 1:9, 1:9] = 200
    chosen = CanvasOptions(**{"size": 40, "items": 4, "smallest": 8, "largest": 14, "overlap": 0.0, **options})
    return Canvases(pixels=pixels, labels=np.arange(6) % 3, num=num, split=split, options=chosen)


def task(folder: Path, **more: object) -> Detection:
    told = {"cache": str(folder / "cache"), "data": str(folder), **more}
    made = task_from("detection", json.loads(json.dumps(prepare_task("detection", told))))
    assert isinstance(made, Detection)
    return made


def small(folder: Path, **more: object) -> Detection:
    write_idx(folder, train=24, held_out=12, side=8)
    options = {"size": 16, "items": 3, "smallest": 5, "largest": 8, "train_canvases": 20, "held_out_canvases": 6}
    return task(folder, **{**options, **more})


def write_coco(folder: Path) -> None:
    """A wide white image with a red thing in each split, and one without a thing."""
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        (folder / split).mkdir()
        wide = image.new("RGB", (20, 10), (255, 255, 255))
        wide.paste((255, 0, 0), (4, 2, 12, 8))
        wide.save(folder / split / "a.png")
        image.new("RGB", (10, 10)).save(folder / split / "b.png")
        told = {
            "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
            "categories": [{"id": 90, "name": "hat"}, {"id": 4, "name": "cat"}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 90, "bbox": [4, 2, 8, 6]},
                {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 20, 10], "iscrowd": 1},
                {"id": 3, "image_id": 7, "category_id": 4, "bbox": [1, 1, 0, 5]},
            ],
        }
        (folder / split / "annotations.json").write_text(json.dumps(told))


def test_a_canvas_depends_on_seed_split_and_its_number_alone() -> None:
    one, other = canvases().scene(7), canvases(num=8).scene(7)
    assert np.array_equal(one.pixels, other.pixels)
    assert np.array_equal(one.boxes, other.boxes)
    looks = {canvases(**more).scene(number).pixels.tobytes()
             for more in ({}, {"seed": 1}, {"split": "held_out"}) for number in range(20)}  # fmt: skip
    assert len(looks) == 60


def test_boxes_are_tight_around_what_is_to_be_seen() -> None:
    for number in range(20):
        scene = canvases().scene(number)
        bright = scene.pixels[0] >= 16
        assert 1 <= len(scene.boxes) <= 4
        covered = np.zeros_like(bright)
        for left, top, right, bottom in scene.boxes.astype(int):
            inside = bright[top:bottom, left:right]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            assert not covered[top:bottom, left:right].any()  # overlap = 0
            covered[top:bottom, left:right] = True
        assert not (bright & ~covered).any()


def test_canvases_have_from_one_to_as_many_items_of_all_sizes_as_asked_for() -> None:
    scenes = [canvases(num=200).scene(number) for number in range(200)]
    assert {len(scene.labels) for scene in scenes} == {1, 2, 3, 4}
    widths = {int(right - left) for scene in scenes for left, _, right, _ in scene.boxes}
    assert min(widths) <= 8
    assert max(widths) >= 12
    assert {int(label) for scene in scenes for label in scene.labels} == {0, 1, 2}


def test_items_that_share_too_much_are_left_out() -> None:
    crowded = [canvases(size=16, items=8, overlap=0.1).scene(number) for number in range(20)]
    assert all(len(scene.labels) <= 4 for scene in crowded)
    assert all(len(scene.labels) >= 1 for scene in crowded)


@pytest.mark.parametrize("wrong", [{"items": 0}, {"smallest": 20}, {"largest": 50}, {"overlap": 2.0}])
def test_items_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="use"):
        canvases(**wrong)


def test_targets_are_padded_and_in_shares_of_the_image(tmp_path: Path) -> None:
    made = small(tmp_path)
    batch = made.samples(range(20), "train")
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "pixel_values": (20, 1, 16, 16),
        "target_labels": (20, 3),
        "target_boxes": (20, 3, 4),
    }
    counted = batch["target_labels"] != -100
    assert bool(batch["target_boxes"][~counted].eq(0).all())
    scene = made.scenes["train"].scene(5)
    x, y, width, height = batch["target_boxes"][5, 0].tolist()
    assert [x - width / 2, y - height / 2, x + width / 2, y + height / 2] == pytest.approx(
        (scene.boxes[0] / 16).tolist(), abs=1e-6
    )
    assert made.weight(batch) == 20.0
    assert made.about() == f"{int(counted.sum()) / 20:.2f} boxes an image on average, of 3 classes"
    values = (batch["pixel_values"] * made.prepared.deviation[0] + made.prepared.mean[0]) * 255
    assert torch.allclose(values[5, 0], torch.from_numpy(scene.pixels[0]).float(), atol=1e-2)


def test_canvases_of_the_two_splits_are_of_their_own_items(tmp_path: Path) -> None:
    made = small(tmp_path)
    assert made.num_samples("train") == 20
    assert made.num_samples("held_out") == 6
    train, held_out = (made.scenes[split] for split in ("train", "held_out"))
    assert isinstance(train, Canvases)
    assert isinstance(held_out, Canvases)
    assert len(train.labels) == 24
    assert len(held_out.labels) == 12
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again.samples([3], "train")["pixel_values"], made.samples([3], "train")["pixel_values"])


def test_the_head_says_classes_channels_and_size(tmp_path: Path) -> None:
    head = small(tmp_path, classes=NAMES).head()
    assert head.config["id2label"] == {0: "coat", 1: "bag", 2: "shoe"}
    assert head.inputs == {"num_channels": 1, "image_size": [16, 16]}
    with pytest.raises(ConfigError, match="3 classes and classes names 1"):
        small(tmp_path, classes=("coat",))


def test_a_coco_folder_is_read_and_scaled_with_its_boxes(tmp_path: Path) -> None:
    write_coco(tmp_path)
    made = task(tmp_path, size=40)
    assert made.prepared.names == ("cat", "hat")
    batch = made.samples([0, 1], "held_out")
    assert batch["pixel_values"].shape == (2, 3, 40, 40)
    assert batch["target_labels"].tolist() == [[1], [-100]]
    scene = made.scenes["held_out"].scene(0)
    assert scene.boxes.tolist() == [[8.0, 4.0, 24.0, 16.0]]
    assert scene.pixels[:, 10, 12].tolist() == [255, 0, 0]
    assert scene.pixels[:, 10, 36].tolist() == [255, 255, 255]
    assert not scene.pixels[:, 20:].any()


def test_what_is_no_coco_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither train-images-idx3-ubyte, .* nor train/annotations.json"):
        task(tmp_path)
    with pytest.raises(ConfigError, match="is a folder of images"):
        task(tmp_path / "nowhere")
    write_coco(tmp_path)
    with pytest.raises(ConfigError, match="set task.size"):
        task(tmp_path)
    for wrong in ("[]", "{", '{"images": [], "categories": [], "annotations": [{"image_id": 1, "category_id": 2}]}'):
        (tmp_path / "val" / "annotations.json").write_text(wrong)
        with pytest.raises(ConfigError, match=r"annotations.json is a COCO file .* correct it"):
            task(tmp_path, size=16)


def boxes(*rows: tuple[float, ...], label: int = 0, scores: tuple[float, ...] | None = None) -> Boxes:
    return Boxes(
        corners=np.array(rows, dtype=np.float64).reshape(-1, 4),
        labels=np.full(len(rows), label, dtype=np.int64),
        scores=None if scores is None else np.array(scores),
    )


def test_map_is_1_of_all_that_is_there_and_0_of_nothing() -> None:
    pytest.importorskip("pycocotools")
    true = [boxes((0, 0, 10, 10), (20, 20, 30, 40)), boxes((5, 5, 9, 9), label=2)]
    found = [boxes((0, 0, 10, 10), (20, 20, 30, 40), scores=(0.9, 0.8)), boxes((5, 5, 9, 9), label=2, scores=(0.7,))]
    score = box_score(true, found, NAMES)
    assert score.figures == {"map": pytest.approx(1.0), "map_50": pytest.approx(1.0), "map_75": pytest.approx(1.0)}
    assert [line.split()[0] for line in score.report.splitlines()] == ["class", "coat", "shoe"]  # no bag there
    none = [boxes(), boxes()]
    assert box_score(true, none, NAMES).figures == {"map": 0.0, "map_50": 0.0, "map_75": 0.0}
    assert box_score(none, none, NAMES).figures["map"] == 0.0


def test_map_of_a_small_case_by_hand() -> None:
    # Two true boxes; the surest guess is nowhere, the second has IoU 0.62 with the first, none is of the second. At the
    # thresholds 0.50, 0.55 and 0.60: precision 1/2 up to recall 1/2, which are 51 of COCO's 101 places, else 0.
    pytest.importorskip("pycocotools")
    true = [boxes((0, 0, 10, 10), (50, 50, 60, 60))]
    found = [boxes((80, 80, 90, 90), (0, 0, 10, 6.2), scores=(0.9, 0.5))]
    figures = box_score(true, found, ("coat",)).figures
    at_half = 0.5 * 51 / 101
    assert figures["map_50"] == pytest.approx(at_half)
    assert figures["map_75"] == 0.0
    assert figures["map"] == pytest.approx(at_half * 3 / 10)


def test_answers_of_a_model_that_knows_score_1(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    made = small(tmp_path)
    assert isinstance(made, Scored)
    batch = made.samples(range(6), "held_out")
    labels = torch.where(batch["target_labels"] < 0, 3, batch["target_labels"])
    outputs = {
        "logits": 9.0 * torch.nn.functional.one_hot(labels, 4).float(),
        "pred_boxes": batch["target_boxes"],
    }
    answers = {name: list(rows) for name, rows in made.answers(outputs, batch).items()}
    assert made.score(answers, range(6), "held_out").figures["map"] == pytest.approx(1.0)
    assert answers["boxes"][0].shape == (9, 4)
    assert float(made.loss(outputs, batch)) < 0.05
    turned = [answers["labels"][i] for i in (1, 2, 3, 4, 5, 0)]
    assert made.score({**answers, "labels": turned}, range(6), "held_out").figures["map"] < 0.9
