"""Export: a plain model that the format's own reader opens, in one file or in shards with an index."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from shardwise.checkpoint import export
from shardwise.checkpoint.export import export_safetensors
from shardwise.checkpoint.load import load_into, load_slices
from shardwise.checkpoint.save import Shard, write_rank
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import Source, open_checkpoint, open_safetensors
from shardwise.checkpoint.storage import begin, commit
from shardwise.errors import CheckpointError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"embed": torch.randn(8, 4), "layers.0.w": torch.randn(4, 4), "layers.1.w": torch.randn(4, 4)}


@pytest.fixture
def source(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Source:
    """The tensors cut in rows over two ranks, with a buffer and optimizer state beside."""
    folder = begin(tmp_path / "run", 3)
    entries = []
    for rank in range(2):
        shards = []
        for name, tensor in tensors.items():
            rows = len(tensor) // 2
            region = TensorSlice(offsets=(rank * rows, 0), sizes=(rows, 4))
            half = tensor[rank * rows : (rank + 1) * rows]
            shards.append(
                Shard(name=name, kind="parameter", global_shape=tuple(tensor.shape), region=region, tensor=half)
            )
        if rank == 0:
            shards.append(Shard.whole("count", torch.tensor([7]), kind="buffer"))
            shards.append(Shard.whole("optimizer/embed/exp_avg", torch.zeros(8, 4), kind="optimizer"))
        entries.append(write_rank(folder, rank, shards))
    return open_checkpoint(commit(folder, entries, state={}))


def test_one_file_holds_parameters_and_buffers_whole(
    tmp_path: Path, source: Source, tensors: dict[str, torch.Tensor]
) -> None:
    assert export_safetensors(source, tmp_path / "out") == (tmp_path / "out" / "model.safetensors",)
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == {*tensors, "count"}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_larger_model_becomes_shards_and_an_index(
    tmp_path: Path, source: Source, tensors: dict[str, torch.Tensor]
) -> None:
    # bytes: embed 128 (alone over the limit) | layers.0.w 64 + ... | with a limit of 100
    files = export_safetensors(source, tmp_path / "out", max_file_bytes=100)
    assert [path.name for path in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_parameters": 65, "total_size": 264}
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / "out" / index["weight_map"][name])[name], tensor)
    again = open_safetensors(tmp_path / "out")
    wanted = {name: TensorSlice(offsets=(1, 1), sizes=(2, 3)) for name in tensors}
    loaded = load_slices(again, wanted)
    assert all(torch.equal(loaded[name], tensors[name][1:3, 1:4]) for name in tensors)


def test_floats_are_converted_when_asked_and_integers_kept(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path / "out", dtype="bfloat16")
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read["embed"].dtype == torch.bfloat16
    assert read["count"].tolist() == [7]
    with pytest.raises(CheckpointError, match="floating point dtype such as bfloat16, got 'int8'"):
        export_safetensors(source, tmp_path / "other", dtype="int8")


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StorageWeakRef] = []
    still_alive: list[int] = []

    def counted(opened, targets, *, cast):  # type: ignore[no-untyped-def]
        still_alive.append(sum(not storage.expired() for storage in made))
        made.extend(StorageWeakRef(target.out.untyped_storage()) for target in targets)
        load_into(opened, targets, cast=cast)

    monkeypatch.setattr(export, "load_into", counted)
    export_safetensors(source, tmp_path / "out")
    assert still_alive == [0, 0, 0, 0]


def test_it_never_writes_beside_another_model(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path / "out", max_file_bytes=100)
    with pytest.raises(CheckpointError, match="without one, but .* holds 4 such files"):
        export_safetensors(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds none of kind other"):
        export_safetensors(source, tmp_path / "nothing", kinds=("other",))
