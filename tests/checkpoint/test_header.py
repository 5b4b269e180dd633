"""The safetensors format: the format's own reader reads ours, ours reads its, no malformed file passes."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from shardwise.checkpoint.header import TensorSpec, encode_header, read_header
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.tensor_file import TORCH_DTYPES, TensorFile, write_tensors
from shardwise.errors import CheckpointError


def samples() -> dict[str, torch.Tensor]:
    """One (3, 5) tensor of every dtype, of random bytes (0 and 1 for bool), and the odd shapes."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, dtype in TORCH_DTYPES.items():
        high = 2 if name == "bool" else 256
        data = torch.randint(high, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[name] = data.view(dtype)
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    specs = {
        key: TensorSpec(key=key, dtype=str(each.dtype).removeprefix("torch."), shape=tuple(each.shape))
        for key, each in tensors.items()
    }
    write_tensors(path, [(specs[key], lambda key=key: tensors[key]) for key in tensors], block_bytes=16)


def test_what_we_write_the_formats_own_reader_reads(tmp_path: Path) -> None:
    write(tmp_path / "ours.safetensors", samples())
    read = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert {key for key, each in samples().items() if same_bytes(read[key], each)} == set(samples())
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_format_s_own_writer_writes_we_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(samples(), tmp_path / "theirs.safetensors")
    with TensorFile(tmp_path / "theirs.safetensors") as file:
        assert file.tensors.keys() == samples().keys()
        for key, expected in samples().items():
            out = torch.empty_like(expected)
            file.read(key, TensorSlice.whole(expected.shape), out)
            assert same_bytes(out, expected), key


def test_a_dtype_outside_the_format_is_refused_with_its_name() -> None:
    with pytest.raises(CheckpointError, match="w is complex128; convert it"):
        TensorSpec(key="w", dtype="complex128", shape=(1,))


def file_of(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "length of its header"),
        (b"\x01\x02", "length of its header"),
        (b"\xff" * 64, "length of its header"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "length of its header"),
        ((4).to_bytes(8, "little") + b"{ok}", "must hold JSON"),
        (file_of([], b""), "JSON object"),
        (file_of(GOOD, b"1234567"), "must end with its last tensor at byte"),
        (file_of(GOOD, b"123456789"), "must end with its last tensor at byte"),
        (file_of({"w": {**GOOD["w"], "dtype": "F33"}}, b"12345678"), "w.dtype must be one of"),
        (file_of({"w": {**GOOD["w"], "shape": [-2]}}, b"12345678"), "w.shape must be a list of whole"),
        (file_of({"w": {**GOOD["w"], "shape": [3]}}, b"12345678"), "w.data_offsets must span 12 bytes"),
        (file_of({"w": {**GOOD["w"], "data_offsets": [4, 12]}}, b"1" * 12), "starts at byte .* is expected"),
        (file_of({"v": GOOD["w"], "w": GOOD["w"]}, b"12345678"), "without gap or overlap"),
    ],
)
def test_a_malformed_file_is_refused_with_its_name(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_tensors_start_at_multiples_of_their_width_and_a_key_stands_once(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(1).double()})
    stored = read_header(tmp_path / "a.safetensors")
    assert stored["b"].start_byte % 8 == 0
    assert stored["a"].start_byte == stored["b"].start_byte + 8
    spec = TensorSpec(key="w", dtype="int8", shape=(1,))
    with pytest.raises(CheckpointError, match="'w' stands twice"):
        encode_header([spec, spec], metadata={})
