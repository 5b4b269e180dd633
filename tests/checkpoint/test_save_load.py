"""Any slicing is read by any other, exactly; only the bytes that are needed are read; nothing is guessed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shardwise.checkpoint import tensor_file
from shardwise.checkpoint.load import Target, check_match, load_into, load_slices, verify_checkpoint
from shardwise.checkpoint.save import Shard, save_checkpoint, write_rank
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import open_checkpoint
from shardwise.checkpoint.storage import begin, commit
from shardwise.errors import CheckpointError

Slicing = Callable[[tuple[int, ...]], list[TensorSlice]]


def cut(dim: int, *stops: int) -> Slicing:
    """Slices along one dim that end at `stops` and at the tensor's end."""

    def slices(shape: tuple[int, ...]) -> Iterator[TensorSlice]:
        start = 0
        for stop in (*stops, shape[dim]):
            offsets = tuple(start if each == dim else 0 for each in range(len(shape)))
            sizes = tuple(stop - start if each == dim else size for each, size in enumerate(shape))
            yield TensorSlice(offsets=offsets, sizes=sizes)
            start = stop

    return lambda shape: list(slices(shape))


def grid(shape: tuple[int, ...]) -> list[TensorSlice]:
    """2 x 2 unequal tiles of the last two dims."""
    rows, columns = cut(len(shape) - 2, 1)(shape), cut(len(shape) - 1, 3)(shape)
    return [tile for a in rows for b in columns if (tile := a.intersection(b)) is not None]


SLICINGS: dict[str, Slicing] = {
    "whole": cut(0),
    "rows": cut(0, 2),
    "columns": cut(1, 2),
    "uneven": cut(0, 1, 3),
    "with an empty rank": cut(0, 2, 2),
    "last dim": lambda shape: cut(len(shape) - 1, 2, 5)(shape),
    "tiles": grid,
}
SHAPES = [(4, 6), (4, 5, 7)]


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def part(tensor: torch.Tensor, region: TensorSlice) -> torch.Tensor:
    return tensor[tuple(slice(a, b) for a, b in zip(region.offsets, region.stops, strict=True))]


def save_sliced(root: Path, tensor: torch.Tensor, slices: list[TensorSlice]) -> Path:
    """Save one tensor "w" with a rank for each slice."""
    folder = begin(root, 5)
    shards = [
        Shard(
            name="w",
            kind="parameter",
            global_shape=tuple(tensor.shape),
            region=region,
            tensor=part(tensor, region),
        )
        for region in slices
    ]
    return commit(folder, [write_rank(folder, r, [shard]) for r, shard in enumerate(shards)], state={"seed": 1})


@pytest.mark.parametrize("saved", SLICINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_slicing_reads_every_other_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str, shape: tuple[int, ...]
) -> None:
    tensor = values(shape)
    folder = save_sliced(tmp_path, tensor, SLICINGS[saved](shape))
    for buffer_bytes in (tensor_file.BUFFER_BYTES, 40):  # the second makes every box larger than the buffer
        monkeypatch.setattr(tensor_file, "BUFFER_BYTES", buffer_bytes)
        for name, wanted in SLICINGS.items():
            for region in wanted(shape):
                loaded = load_slices(folder, {"w": region})["w"]
                assert torch.equal(loaded, part(tensor, region)), (name, region)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
def test_any_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = values((6, 4)).to(dtype)
    folder = save_sliced(tmp_path, tensor, cut(0, 4)((6, 4)))
    region = TensorSlice(offsets=(2, 1), sizes=(3, 2))
    loaded = load_slices(folder, {"w": region})["w"]
    assert loaded.dtype == dtype
    assert loaded.view(torch.uint8).tolist() == part(tensor, region).contiguous().view(torch.uint8).tolist()


def test_blocks_smaller_than_a_piece_are_checked_and_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardwise.checkpoint.tensor_file.BUFFER_BYTES", 1 << 18)
    tensor = values((3000, 257))  # 3 MB: blocks of 1 MiB end inside rows
    folder = save_checkpoint(tmp_path, 1, [Shard.whole("w", tensor)], state={})
    for ranges in [
        ((0, 3000), (0, 257)),
        ((1000, 1100), (0, 257)),
        ((5, 2999), (250, 256)),
        ((2999, 3000), (0, 1)),
    ]:
        region = TensorSlice(offsets=tuple(a for a, _ in ranges), sizes=tuple(b - a for a, b in ranges))
        assert torch.equal(load_slices(folder, {"w": region})["w"], part(tensor, region))
    assert verify_checkpoint(folder) == tensor.nbytes


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of every read of tensor bytes."""
    sizes: list[int] = []
    read_exactly = tensor_file.read_exactly

    def counted(file, start, view):  # type: ignore[no-untyped-def]
        sizes.append(len(view))
        read_exactly(file, start, view)

    monkeypatch.setattr(tensor_file, "read_exactly", counted)
    return sizes


def test_rows_read_little_more_than_their_bytes(tmp_path: Path, bytes_read: list[int]) -> None:
    tensor = values((4096, 1024))  # 16 MiB in blocks of 1 MiB
    folder = save_checkpoint(tmp_path, 1, [Shard.whole("w", tensor)], state={})
    load_slices(folder, {"w": TensorSlice(offsets=(1000, 0), sizes=(512, 1024))})  # 2 MiB
    assert 2 << 20 <= sum(bytes_read) <= 4 << 20
    bytes_read.clear()
    load_slices(folder, {"w": TensorSlice.whole((4096, 1024))})
    assert bytes_read == [tensor_file.BUFFER_BYTES] * 2


def test_ties_replicas_and_several_slices_of_one_rank(tmp_path: Path) -> None:
    # Each of two ranks holds its half of q, k and v in one packed (6, 2) tensor: q0 k0 v0 | q1 k1 v1
    whole = values((12, 2))
    folder = begin(tmp_path, 1)
    entries = []
    for rank in range(2):
        rows = [TensorSlice(offsets=(4 * group + 2 * rank, 0), sizes=(2, 2)) for group in range(3)]
        packed = torch.cat([part(whole, region) for region in rows])
        shards = [
            Shard(
                name="qkv",
                kind="parameter",
                global_shape=(12, 2),
                region=region,
                tensor=packed[2 * i : 2 * i + 2],
            )
            for i, region in enumerate(rows)
        ]
        entries.append(write_rank(folder, rank, [*shards, Shard.whole("norm", torch.ones(2))]))
    source = open_checkpoint(commit(folder, entries, state={}))
    assert len(source.manifest.tensors["norm"].pieces) == 1
    tied = source.renamed({"attention.qkv": "qkv", "head.qkv": "qkv"})
    loaded = load_slices(tied, {name: TensorSlice.whole((12, 2)) for name in tied.manifest.tensors})
    assert torch.equal(loaded["attention.qkv"], whole)
    assert torch.equal(loaded["head.qkv"], whole)


def test_parameters_are_filled_in_place_and_cast_only_when_asked(tmp_path: Path) -> None:
    tensor = values((4, 6), torch.bfloat16)
    source = open_checkpoint(save_checkpoint(tmp_path, 1, [Shard.whole("w", tensor)], state={}))
    parameter = torch.nn.Parameter(torch.zeros(6, 2).t())  # (2, 6), not contiguous
    region = TensorSlice(offsets=(1, 0), sizes=(2, 6))
    target = Target(name="w", global_shape=(4, 6), region=region, out=parameter)
    with pytest.raises(CheckpointError, match=r"w was saved as bfloat16 .* torch.float32; .*cast=True"):
        load_into(source, [target])
    load_into(source, [target], cast=True)
    assert torch.equal(parameter, tensor[1:3].float())
    assert parameter.requires_grad


def test_state_step_and_optimizer_tensors_come_back(tmp_path: Path) -> None:
    state = {"seed": 3, "tokens": 12_345, "optimizer": {"w": {"step": 7}}}
    moment = values((4, 6))
    shards = [Shard.whole("optimizer/w/exp_avg", moment, kind="optimizer"), Shard.whole("t", torch.tensor(3))]
    save_checkpoint(tmp_path, 7, [*shards, Shard.whole("none", torch.zeros(0, 3), kind="buffer")], state=state)
    source = open_checkpoint(tmp_path)
    assert (source.manifest.step, source.manifest.state) == (7, state)
    assert source.manifest.tensors["optimizer/w/exp_avg"].kind == "optimizer"
    wanted = {name: TensorSlice.whole(e.global_shape) for name, e in source.manifest.tensors.items()}
    loaded = load_slices(source, wanted)
    assert torch.equal(loaded["optimizer/w/exp_avg"], moment)
    assert loaded["t"].item() == 3
    assert loaded["none"].shape == (0, 3)


def test_what_does_not_fit_is_told_with_names_and_numbers(tmp_path: Path) -> None:
    shards = [Shard.whole("model.wq", values((4, 6))), Shard.whole("model.wk", values((2, 6)))]
    source = open_checkpoint(save_checkpoint(tmp_path, 1, shards, state={}))
    whole = TensorSlice.whole((4, 6))
    with pytest.raises(CheckpointError, match=r"no model.wx; close to it are model.w[qk]"):
        load_slices(source, {"model.wx": whole})
    with pytest.raises(CheckpointError, match=r"\[0:4, 0:7\] of model.wq leaves the saved shape \(4, 6\)"):
        load_slices(source, {"model.wq": TensorSlice.whole((4, 7))})
    with pytest.raises(CheckpointError, match=r"model.wq must have its saved shape \(4, 6\), but .*\(2, 6\)"):
        load_slices(source, {"model.wq": TensorSlice.whole((2, 6))}, global_shapes={"model.wq": (2, 6)})
    with pytest.raises(CheckpointError, match=r"goes to shape \(4, 5\)"):
        load_into(source, [Target(name="model.wq", global_shape=(4, 6), region=whole, out=torch.zeros(4, 5))])
    check_match(source, {"model.wq": (4, 6), "model.wk": (2, 6)})
    check_match(source, {"model.wq": (4, 6)}, allow_extra=True)
    complaint = (
        r"1 missing: model.wv \(4, 6\); 1 extra: model.wk \(2, 6\); 1 of another shape: model.wq \(4, 6\) "
        r"instead of \(8, 6\)"
    )
    with pytest.raises(CheckpointError, match=complaint):
        check_match(source, {"model.wq": (8, 6), "model.wv": (4, 6)})


def test_shards_that_cannot_be_are_refused(tmp_path: Path) -> None:
    whole = TensorSlice.whole((2, 3))
    with pytest.raises(CheckpointError, match=r"w has shape \(3, 2\) for slice \[0:2, 0:3\]"):
        Shard(name="w", kind="parameter", global_shape=(2, 3), region=whole, tensor=torch.zeros(3, 2))
    with pytest.raises(CheckpointError, match="w has no values"):
        Shard.whole("w", torch.zeros(2, device="meta"))
    folder = begin(tmp_path, 1)
    with pytest.raises(CheckpointError, match="must agree"):
        write_rank(folder, 0, [Shard.whole("w", torch.zeros(2)), Shard.whole("w", torch.zeros(3))])
    with pytest.raises(CheckpointError, match="stands twice"):
        write_rank(folder, 0, [Shard.whole("w", torch.zeros(2)), Shard.whole("w", torch.zeros(2))])
    with pytest.raises(CheckpointError, match="could not write"):
        write_rank(tmp_path / "nowhere", 0, [Shard.whole("w", torch.zeros(2))])
