"""Tensors of a side in files: what is written is read, and a side travels as names."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from shardwise.describe.tensor import Slice, TensorPlan, UnitPlan
from shardwise.parallel.tensor.slices import cut
from shardwise.verify.comparison import errors_of
from shardwise.verify.stored import Joined, StoredTensors


def test_what_is_put_is_read_under_any_name(tmp_path: Path) -> None:
    stored = StoredTensors(tmp_path)
    tensors = {
        "a.weight": torch.arange(6.0).view(2, 3).t(),
        "x" * 300 + "/..": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "none of it": torch.zeros(0, 4),
    }
    for name, tensor in tensors.items():
        stored.put(name, tensor)
    assert list(stored) == list(tensors)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert all(stored[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_it_travels_as_names(tmp_path: Path) -> None:
    stored = StoredTensors(tmp_path)
    stored.put("w", torch.zeros(100_000))
    packed = pickle.dumps(stored)
    assert len(packed) < 1_000
    assert torch.equal(pickle.loads(packed)["w"], torch.zeros(100_000))


def test_a_name_that_was_not_put_is_missing(tmp_path: Path) -> None:
    stored = StoredTensors(tmp_path)
    assert stored.get("w") is None
    with pytest.raises(KeyError):
        stored["w"]


def test_stages_are_joined_to_all_names(tmp_path: Path) -> None:
    stored = StoredTensors(tmp_path)
    stored.put("w", torch.ones(1))
    joined = Joined([(stored, 0, None), ({"v": torch.zeros(1)}, 0, None)])
    assert list(joined) == ["w", "v"]
    assert joined["w"] == 1
    assert joined["v"] == 0
    assert joined.get("u") is None


def test_shards_are_joined_to_whole_tensors_and_what_two_hold_is_counted_once() -> None:
    packed = Slice.even(0, 8, 2, parts=(4, 4))
    keys = Slice(dim=0, size=2, ranges=(((0, 2),), ((0, 2),)))
    unit = UnitPlan(slices={"packed": packed, "keys": keys})
    plan = TensorPlan(tp=2, units={"block": unit}, reasons={}, sharded_share=1.0)
    whole = torch.arange(8.0)
    sides = [
        (
            {"block.packed": cut(whole, packed, shard), "block.keys": torch.tensor([5.0, 7.0]), "block.none": None},
            shard,
            plan,
        )
        for shard in (0, 1)
    ]
    joined = Joined(sides)
    assert torch.equal(joined["block.packed"], whole)
    assert joined["block.keys"].tolist() == [5.0, 7.0]
    assert joined["block.none"] is None


def test_errors_in_files_are_the_errors_in_memory(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"large": 2**20 + 5, "small": 3, "without": 4}
        reference = {name: torch.randn(size) for name, size in sizes.items()}
        off = {name: tensor + 1e-3 * torch.randn(tensor.shape) for name, tensor in reference.items()}
    files = [StoredTensors(tmp_path / name) for name in ("a", "b")]
    for folder, tensors in zip(files, (off, reference), strict=True):
        folder.folder.mkdir()
        for name, tensor in tensors.items():
            folder.put(name, tensor)
    gradients = {name: tensor for name, tensor in reference.items() if name != "without"}
    for by_sign in (False, True):
        in_memory = errors_of(off, off, gradients, reference, by_sign=by_sign)
        in_files = errors_of(files[0], files[0], gradients, files[1], by_sign=by_sign)
        assert in_files == in_memory
    assert [error.update < 2e-3 for error in in_memory] == [True, True, True]
    assert in_memory[0].gradient == pytest.approx(1e-3, rel=0.01)
    assert in_memory[0].left_out > 500  # of a million, below a thousandth of the mean size
    assert in_memory[2].gradient > 1  # a gradient where the reference has none
