"""Plain transformers folders as a source: only the wanted slices are read, in memory about their size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardwise.checkpoint import tensor_file
from shardwise.checkpoint.load import check_match, load_slices
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import open_checkpoint, open_safetensors
from shardwise.errors import CheckpointError


def box(*ranges: tuple[int, int]) -> TensorSlice:
    return TensorSlice(offsets=tuple(a for a, _ in ranges), sizes=tuple(b - a for a, b in ranges))


def sharded_model(folder: Path) -> dict[str, torch.Tensor]:
    """A model in two shards with an index, as transformers saves a large one."""
    tensors = {name: torch.randn(4, 3) for name in ("embed", "layers.0.w", "layers.1.w", "head")}
    files = {"model-00001-of-00002.safetensors": ["embed", "layers.0.w"]}
    files["model-00002-of-00002.safetensors"] = ["layers.1.w", "head"]
    folder.mkdir(exist_ok=True)
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 192}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_a_folder_with_an_index_is_one_source(tmp_path: Path) -> None:
    tensors = sharded_model(tmp_path)
    source = open_safetensors(tmp_path)
    check_match(source, dict.fromkeys(tensors, (4, 3)))
    loaded = load_slices(source, {name: box((1, 3), (0, 2)) for name in tensors})
    assert all(torch.equal(loaded[name], tensors[name][1:3, :2]) for name in tensors)


def test_a_rank_opens_only_the_shards_it_needs(tmp_path: Path) -> None:
    tensors = sharded_model(tmp_path)
    source = open_safetensors(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    loaded = load_slices(source, {"embed": box((0, 4), (0, 3))})
    assert torch.equal(loaded["embed"], tensors["embed"])


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_single_file_is_a_source_by_folder_and_by_name(tmp_path: Path, name: str) -> None:
    save_file({"w": torch.arange(6.0)}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        assert load_slices(open_safetensors(path), {"w": box((2, 4))})["w"].tolist() == [2, 3]


def test_a_folder_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has neither .0 other.*give the right folder"):
        open_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled weights are never opened"):
        open_safetensors(tmp_path)
    with pytest.raises(CheckpointError, match="could not read"):
        open_safetensors(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="finished checkpoint"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "weight_map, complaint",
    [
        ({"embed": 3}, "weight_map.embed must be a string"),
        ({"embed": "../model.safetensors"}, "weight_map.embed must be the plain name"),
        ({"head": "model-00001-of-00002.safetensors"}, "weight_map.head must name the file that holds it"),
        ({"head": "model-00003-of-00002.safetensors"}, "could not read .*model-00003-of-00002"),
        ([], "weight_map must be an object"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: object, complaint: str) -> None:
    sharded_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=complaint):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "region, most",
    [
        (box((500, 756), (0, 2048)), 1.0),  # rows: one run
        (box((0, 1000), (0, 1024)), 2.0),  # half the columns: gaps are read along
        (box((0, 1000), (0, 16)), 130.0),  # few columns: 64 KiB at a time, 8 rows, as a disk reads pages
        (box((7, 8), (100, 101)), 1.0),
    ],
)
def test_a_slice_reads_about_its_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, region: TensorSlice, most: float
) -> None:
    tensor = torch.randn(1000, 2048)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    sizes: list[int] = []
    read_exactly = tensor_file.read_exactly

    def counted(file, start, view):  # type: ignore[no-untyped-def]
        sizes.append(len(view))
        read_exactly(file, start, view)

    monkeypatch.setattr(tensor_file, "read_exactly", counted)
    loaded = load_slices(open_safetensors(tmp_path), {"w": region})["w"]
    (a, c), (b, d) = region.offsets, region.stops
    assert torch.equal(loaded, tensor[a:b, c:d])
    assert loaded.nbytes <= sum(sizes) <= most * loaded.nbytes


def test_rows_far_apart_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.zeros(4, 1 << 18)}, tmp_path / "model.safetensors")  # rows of 1 MiB
    sizes: list[int] = []
    monkeypatch.setattr(tensor_file, "read_exactly", lambda file, start, view: sizes.append(len(view)))
    load_slices(open_safetensors(tmp_path), {"w": box((0, 4), (0, 1000))})
    assert sizes == [4000] * 4


def peak_bytes(*, reset: bool = False) -> int:
    """The peak of this process's resident memory; with `reset`, what it is from now on."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmHWM"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_memory_peaks_at_about_the_slice_not_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(12288, 2048)}, tmp_path / "model.safetensors")  # 96 MiB
    source = open_safetensors(tmp_path)
    before = peak_bytes(reset=True)
    slice_of_it = load_slices(source, {"w": box((0, 12288), (0, 256))})["w"]  # 12 MiB, spread over the file
    grown = peak_bytes() - before
    # One buffer beside the result, and 8 MiB for the allocator, which need not give back what it has freed.
    assert grown <= slice_of_it.nbytes + tensor_file.BUFFER_BYTES + (8 << 20)
