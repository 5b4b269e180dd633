"""The safetensors file format: dtypes, the header, and where in the file each tensor's bytes lie.

Knows the format, as written at https://github.com/huggingface/safetensors#format. Refuses to know torch.

    8 bytes          N, the length of the header, little-endian
    N bytes          JSON: {"key": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}, padded
                     with spaces to a multiple of 8
    the rest         the tensors, row-major, little-endian, without gaps
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from shardwise.checkpoint.disk import check_file, disk_errors
from shardwise.checkpoint.strict_json import DAMAGED, Record, parse_object
from shardwise.errors import CheckpointError

__all__ = ["ITEM_BYTES", "StoredTensor", "TensorSpec", "encode_header", "file_order", "read_header"]

# torch's name of a dtype -> the code of the format and the bytes of an element. The format has no
# complex128, and packs the 4-bit types otherwise than torch.
_DTYPES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "float64": ("F64", 8),
        "float32": ("F32", 4),
        "float16": ("F16", 2),
        "bfloat16": ("BF16", 2),
        "float8_e4m3fn": ("F8_E4M3", 1),
        "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
        "float8_e5m2": ("F8_E5M2", 1),
        "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
        "float8_e8m0fnu": ("F8_E8M0", 1),
        "int64": ("I64", 8),
        "int32": ("I32", 4),
        "int16": ("I16", 2),
        "int8": ("I8", 1),
        "uint64": ("U64", 8),
        "uint32": ("U32", 4),
        "uint16": ("U16", 2),
        "uint8": ("U8", 1),
        "bool": ("BOOL", 1),
        "complex64": ("C64", 8),
    }
)
_NAMES: Mapping[str, str] = MappingProxyType({code: name for name, (code, _) in _DTYPES.items()})

ITEM_BYTES: Mapping[str, int] = MappingProxyType({name: size for name, (_, size) in _DTYPES.items()})

_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor to be written: key in the file, torch's name of a dtype the format knows, shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise CheckpointError(
                f"safetensors holds {', '.join(_DTYPES)}, but {self.key} is {self.dtype}; convert it before saving"
            )

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: `spec.num_bytes` bytes from `start_byte`, counted from the file's start."""

    spec: TensorSpec
    start_byte: int


def file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The order of tensors in a file: widest elements first, so that each starts aligned."""
    return sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.key))


def encode_header(specs: Sequence[TensorSpec], *, metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds `specs` in this order; the tensors' bytes follow."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for spec in specs:
        end = start + spec.num_bytes
        if spec.key in entries:
            raise CheckpointError(f"keys in a file are unique, but {spec.key!r} stands twice; rename one tensor")
        entries[spec.key] = {
            "dtype": _DTYPES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Key -> tensor of a safetensors file. Reads the header only; checks that the tensors fill the rest
    exactly.

    Raises CheckpointError that names file and field when the file is missing, truncated or malformed.
    """
    check_file(path)
    with disk_errors("read", path), path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} must begin with the length of its header, but {header_bytes} bytes do not fit into "
                f"a file of {file_bytes}; {DAMAGED}"
            )
        header = parse_object(file.read(header_bytes), path=path)
    data_start = 8 + header_bytes
    stored = [_parse_tensor(key, header.record(key), data_start) for key in header.fields if key != "__metadata__"]
    _check_no_gaps(stored, path=path, data_start=data_start, file_bytes=file_bytes)
    return {tensor.spec.key: tensor for tensor in stored}


def _parse_tensor(key: str, record: Record, data_start: int) -> StoredTensor:
    record.only("dtype", "shape", "data_offsets")
    code = record.text("dtype")
    if code not in _NAMES:
        record.refuse("dtype", rule=f"must be one of {', '.join(_NAMES)}")
    spec = TensorSpec(key=key, dtype=_NAMES[code], shape=record.integers("shape"))
    offsets = record.integers("data_offsets")
    if len(offsets) != 2 or offsets[1] - offsets[0] != spec.num_bytes:
        record.refuse("data_offsets", rule=f"must span {spec.num_bytes} bytes ({code} of {spec.shape})")
    return StoredTensor(spec=spec, start_byte=data_start + offsets[0])


def _check_no_gaps(stored: Sequence[StoredTensor], *, path: Path, data_start: int, file_bytes: int) -> None:
    end = data_start
    for tensor in sorted(stored, key=lambda tensor: (tensor.start_byte, tensor.spec.num_bytes)):
        if tensor.start_byte != end:
            raise CheckpointError(
                f"{path}: the tensors must lie without gap or overlap, but {tensor.spec.key} starts at byte "
                f"{tensor.start_byte} where {end} is expected; {DAMAGED}"
            )
        end += tensor.spec.num_bytes
    if end != file_bytes:
        raise CheckpointError(
            f"{path} must end with its last tensor at byte {end}, but it has {file_bytes} bytes; {DAMAGED}"
        )
