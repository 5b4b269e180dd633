"""Two hundred damaged checkpoints: each is read exactly as it was saved, or refused by name."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardwise.checkpoint.load import load_slices, verify_checkpoint
from shardwise.checkpoint.save import Shard, save_checkpoint, write_rank
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import open_checkpoint, open_safetensors
from shardwise.checkpoint.storage import begin, commit
from shardwise.errors import CheckpointError

TENSOR = torch.arange(48.0).reshape(8, 6)
FILES = ("manifest.json", "rank_0.safetensors", "rank_1.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = begin(tmp_path / "run", 1)
    entries = []
    for rank in range(2):
        region = TensorSlice(offsets=(4 * rank, 0), sizes=(4, 6))
        half = TENSOR[4 * rank : 4 * rank + 4]
        shard = Shard(name="w", kind="parameter", global_shape=(8, 6), region=region, tensor=half)
        entries.append(write_rank(folder, rank, [shard, Shard.whole(f"b{rank}", torch.ones(3) * rank)]))
    return commit(folder, entries, state={"seed": 1})


def read_all(folder: Path) -> dict[str, object]:
    source = open_checkpoint(folder)
    verify_checkpoint(folder)
    wanted = {name: TensorSlice.whole(e.global_shape) for name, e in source.manifest.tensors.items()}
    values = {name: tensor.tolist() for name, tensor in load_slices(source, wanted).items()}
    return {**values, "step": source.manifest.step, "state": source.manifest.state}


def attempt(read: Callable[[], dict[str, object]]) -> tuple[str, dict[str, object] | None]:
    """The complaint or the values; anything but a CheckpointError is a failure of the test."""
    try:
        return "", read()
    except CheckpointError as error:
        return str(error), None


def shapes_of(path: Path) -> dict[str, object]:
    """Load all of a plain model, without checksums."""
    source = open_safetensors(path)
    wanted = {name: TensorSlice.whole(e.global_shape) for name, e in source.manifest.tensors.items()}
    shapes: dict[str, object] = {n: tuple(t.shape) for n, t in load_slices(source, wanted).items()}
    assert shapes == {name: region.sizes for name, region in wanted.items()}
    return shapes


def damage(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    kind = chance.choice(["cut", "bit", "bit", "bit", "bytes", "longer", "swap", "garbage"])
    if kind == "cut":
        return data[:at]
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == "bytes":
        return data[:at] + chance.randbytes(5) + data[at + 5 :]
    if kind == "longer":
        return data + chance.randbytes(9)
    if kind == "swap":
        return data[at:] + data[:at]
    return chance.randbytes(at)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_checkpoint_is_exact_or_refused(saved: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    truth = read_all(saved)
    refused = 0
    for trial in range(50):
        folder = tmp_path / f"damaged_{trial}"
        shutil.copytree(saved, folder)
        path = folder / chance.choice(FILES)
        path.write_bytes(damage(path.read_bytes(), chance))
        complaint, values = attempt(lambda folder=folder: read_all(folder))
        assert values == truth or str(folder) in complaint, f"trial {trial}, {path.name}: {complaint}"
        refused += bool(complaint)
    assert refused >= 40  # what still reads was hit in white space or in a part that says nothing


def test_every_single_bit_of_the_data_is_guarded(saved: Path) -> None:
    path = saved / "rank_1.safetensors"
    good = path.read_bytes()
    data_bytes = 4 * 6 * 4 + 3 * 4
    for at in range(len(good) - data_bytes, len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with pytest.raises(CheckpointError, match=r"rank_1.safetensors: bytes .* must have crc32"):
            read_all(saved)


def test_files_of_two_saves_cannot_be_mixed(saved: Path) -> None:
    (saved / "rank_0.safetensors").rename(saved / "rank_1.safetensors")
    with pytest.raises(CheckpointError, match="rank_1.safetensors must hold"):
        load_slices(saved, {"w": TensorSlice(offsets=(4, 0), sizes=(4, 6))})


def test_a_file_of_another_model_is_refused_with_both_shapes(tmp_path: Path) -> None:
    ours, theirs = (
        save_checkpoint(tmp_path / f"run_{rows}", 1, [Shard.whole("w", torch.ones(rows, 6))], state={})
        for rows in (4, 2)
    )
    shutil.copy(theirs / "rank_0.safetensors", ours / "rank_0.safetensors")
    with pytest.raises(CheckpointError, match=r"w as float32 \(4, 6\), but holds float32 \(2, 6\)"):
        load_slices(ours, {"w": TensorSlice.whole((4, 6))})


def test_a_plain_model_that_is_damaged_is_refused_or_has_the_shapes_of_its_header(tmp_path: Path, saved: Path) -> None:
    chance = random.Random(9)
    good = (saved / "rank_0.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for _ in range(50):
        path.write_bytes(damage(good, chance))
        complaint, values = attempt(lambda: shapes_of(path))
        assert values is not None or str(path) in complaint
