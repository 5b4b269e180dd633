"""Images: idx files and folders, normalised; changed by (seed, step, sample) alone; scored by accuracy."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.tasks import ImageClassification, Scored, prepare_task, samples_at, task_from
from shardwise.tasks.image_files import read_idx


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, *, train: int = 12, held_out: int = 5, side: int = 6, classes: int = 3) -> None:
    """Images of noise, whose first pixel tells their class; one file gzipped, one not."""
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", held_out)):
        labels = np.arange(count) % classes
        pixels = rng.integers(0, 256, (count, side, side))
        pixels[:, 0, 0] = labels * 100
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))


def task(folder: Path, **more: object) -> ImageClassification:
    told = {"cache": str(folder / "cache"), "data": str(folder), **more}
    made = task_from("images", prepare_task("images", told))
    assert isinstance(made, ImageClassification)
    return made


def test_pixels_of_training_images_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    write_idx(tmp_path)
    batch = task(tmp_path).samples(range(12), "train")
    assert batch["pixel_values"].shape == (12, 1, 6, 6)
    assert float(batch["pixel_values"].mean()) == pytest.approx(0, abs=1e-5)
    assert float(batch["pixel_values"].std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert batch["labels"].tolist() == [i % 3 for i in range(12)]


def test_what_is_done_to_an_image_depends_on_seed_step_and_its_number_alone(tmp_path: Path) -> None:
    write_idx(tmp_path)
    made = task(tmp_path, shift=2, flip=True)

    def look(*indices: int, seed: int = 0, step: int = 0) -> torch.Tensor:
        return samples_at(made, indices, "train", seed=seed, step=step)["pixel_values"]

    assert torch.equal(look(3, 7)[1], look(7, 1, 2)[0])
    assert not torch.equal(look(*range(12)), look(*range(12), step=1))
    assert not torch.equal(look(*range(12)), look(*range(12), seed=1))
    assert torch.equal(samples_at(made, [2], "held_out", seed=0, step=5)["pixel_values"],
                       made.samples([2], "held_out")["pixel_values"])  # fmt: skip
    shifts = {tuple(look(0, step=s).flatten().tolist()) for s in range(200)}
    assert len(shifts) > 40  # of 2 * 25


def test_a_shifted_image_is_the_image_moved(tmp_path: Path) -> None:
    write_idx(tmp_path)
    made = task(tmp_path, shift=1)
    plain = np.pad(made.pixels["train"][4, 0], 1)
    windows = [plain[top : top + 6, left : left + 6] for top in range(3) for left in range(3)]
    mean, deviation = made.summary.mean[0], made.summary.deviation[0]
    for step in range(5):
        seen = made.augmented([4], seed=0, step=step)["pixel_values"][0, 0].numpy() * deviation + mean
        assert any(np.allclose(seen * 255, window, atol=1e-2) for window in windows)


def test_accuracy_is_the_share_of_images_with_their_class(tmp_path: Path) -> None:
    write_idx(tmp_path)
    made = task(tmp_path, classes=["coat", "bag", "shoe"])
    assert isinstance(made, Scored)
    batch = made.samples(range(5), "held_out")
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 0]), 3).float()
    score = made.score({"labels": list(made.answers(logits, batch)["labels"])}, range(5), "held_out")
    assert score.figures == {"accuracy": 0.8}
    assert "bag                0.5000       2" in score.report
    assert made.head().config["id2label"] == {0: "coat", 1: "bag", 2: "shoe"}
    assert made.head().inputs == {"num_channels": 1, "image_size": 6}
    assert pickle.loads(pickle.dumps(made)).augment == made.augment


def test_a_folder_a_class_is_scaled_to_one_size(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            image.new("RGB", (10, 8), (200 * label, 10, 30)).save(tmp_path / split / name / "0.png")
    made = task(tmp_path, size=4)
    assert made.summary.names == ("cat", "dog")
    assert made.pixels["held_out"][:, :, 0, 0].tolist() == [[0, 10, 30], [200, 10, 30]]
    assert made.samples([0, 1], "train")["pixel_values"].shape == (2, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"set task.size"):
        task(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\x01abcd"])
def test_a_file_that_is_cut_off_or_of_another_type_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(ConfigError, match="is an idx file, but"):
        read_idx(tmp_path / "train-images-idx3-ubyte")
