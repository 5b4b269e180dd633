"""One safetensors file of tensors: written as a stream, read by boxes, with checksums of blocks.

Knows torch's bytes and the disk. Refuses to know names of models, manifests and ranks.

Reading never maps the file (mapped pages would count as the process's memory, and a file cut short under a
map kills the process) and never holds more than BUFFER_BYTES of it: a box that spans more is halved until it
fits.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO

import torch

from shardwise.checkpoint.disk import disk_errors
from shardwise.checkpoint.header import (
    ITEM_BYTES,
    StoredTensor,
    TensorSpec,
    encode_header,
    file_order,
    read_header,
)
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.strict_json import DAMAGED
from shardwise.errors import CheckpointError

__all__ = ["BUFFER_BYTES", "TORCH_DTYPES", "TensorFile", "write_tensors"]

BUFFER_BYTES = 8 << 20  # the most that one read spans
_PAGE_RUN_BYTES = 64 << 10  # reading this much at once is as quick as skipping inside it

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({name: getattr(torch, name) for name in ITEM_BYTES})


def write_tensors(
    path: Path, tensors: Sequence[tuple[TensorSpec, Callable[[], torch.Tensor]]], *, block_bytes: int
) -> dict[str, str]:
    """Write a safetensors file and sync it; returns key -> checksums (8 hex digits a block of `block_bytes`).

    Each tensor is made by its function only when its turn comes and let go after, so that a model larger than
    memory can be written. Raises CheckpointError when a tensor is not what its spec says, or the disk
    refuses.
    """
    makers = {spec.key: make for spec, make in tensors}
    specs = file_order([spec for spec, _ in tensors])
    checksums: dict[str, str] = {}
    with disk_errors("write", path), path.open("wb") as file:
        file.write(encode_header(specs, metadata={"format": "pt"}))
        for spec in specs:
            checksums[spec.key] = _write_one(file, spec, makers[spec.key], block_bytes=block_bytes)
        file.flush()
        os.fsync(file.fileno())
    return checksums


class TensorFile:
    """A safetensors file open for reading, used with `with`. `tensors` is key -> where it lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, StoredTensor] = read_header(path)
        with disk_errors("read", path):
            self._file = FileIO(path, "rb")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, key: str, box: TensorSlice, out: torch.Tensor, *, checksums: str = "", block_bytes: int = 1) -> None:
        """Copy the box of tensor `key` into `out` (shape `box.sizes`, any dtype, strides and device).

        With `checksums`, reads whole blocks and raises CheckpointError when one is not what was written.
        """
        stored = self.tensors[key]
        strides = _row_major(stored.spec.shape)
        item_bytes = ITEM_BYTES[stored.spec.dtype]
        waiting = [(box, out)] if box.num_elements else []
        while waiting:
            part, target = waiting.pop()
            first = sum(offset * stride for offset, stride in zip(part.offsets, strides, strict=True))
            last = first + sum((size - 1) * stride for size, stride in zip(part.sizes, strides, strict=True))
            span_bytes = (last + 1 - first) * item_bytes
            if not _at_once(span_bytes, part.num_elements * item_bytes, checked=bool(checksums)):
                waiting.extend(_halves(part, target))
                continue
            start = first * item_bytes
            data = self._bytes(stored, start, start + span_bytes, checksums, block_bytes)
            target.copy_(data.view(TORCH_DTYPES[stored.spec.dtype]).as_strided(part.sizes, strides))

    def check(self, key: str, *, checksums: str, block_bytes: int) -> int:
        """Read all of a tensor against its checksums; returns its bytes. CheckpointError on damage."""
        stored = self.tensors[key]
        for start in range(0, stored.spec.num_bytes, BUFFER_BYTES):
            self._bytes(stored, start, min(start + BUFFER_BYTES, stored.spec.num_bytes), checksums, block_bytes)
        return stored.spec.num_bytes

    def _bytes(self, stored: StoredTensor, start: int, stop: int, checksums: str, block_bytes: int) -> torch.Tensor:
        """Bytes start .. stop of a tensor, (stop - start,) uint8; whole blocks are read where checked."""
        low, high = start, stop
        if checksums:
            low = start // block_bytes * block_bytes
            high = min(math.ceil(stop / block_bytes) * block_bytes, stored.spec.num_bytes)
        data = torch.empty(high - low, dtype=torch.uint8)
        view = data.numpy().data
        with disk_errors("read", self.path):
            read_exactly(self._file, stored.start_byte + low, view)
        for block in range(low, high if checksums else low, block_bytes):
            expected = checksums[block // block_bytes * 8 :][:8]
            if _checksum(view[block - low : block - low + block_bytes]) != expected:
                raise CheckpointError(
                    f"{self.path}: bytes {block} to {min(block + block_bytes, high)} of {stored.spec.key} "
                    f"must have crc32 {expected or 'nothing'}, and have not; {DAMAGED}"
                )
        return data[start - low : stop - low]


def _write_one(file: BinaryIO, spec: TensorSpec, make: Callable[[], torch.Tensor], *, block_bytes: int) -> str:
    """Append one tensor's bytes; returns their checksums. Its memory is free when this returns."""
    data = _bytes_of(spec, make())
    blocks = [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]
    for block in blocks:
        file.write(block)
    return "".join(map(_checksum, blocks))


def read_exactly(file: FileIO, start: int, view: memoryview) -> None:
    """Fill `view` from byte `start` of the file; OSError when the file ends before."""
    file.seek(start)
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise OSError(f"the file ends at byte {start + filled}, {len(view) - filled} bytes early")
        filled += count


def _at_once(span_bytes: int, useful_bytes: int, *, checked: bool) -> bool:
    """Whether to read a span in one go: it fits, and is not mostly bytes that nobody wants.

    Checked blocks are read whole in any case, so there only the size counts.
    """
    return span_bytes <= BUFFER_BYTES and (checked or span_bytes <= max(2 * useful_bytes, _PAGE_RUN_BYTES))


def _halves(box: TensorSlice, out: torch.Tensor) -> list[tuple[TensorSlice, torch.Tensor]]:
    """The box cut in two on its first dim longer than 1, which spans most; second half first."""
    dim = next(dim for dim, size in enumerate(box.sizes) if size > 1)
    middle = box.sizes[dim] // 2
    halves = []
    for start, size in ((middle, box.sizes[dim] - middle), (0, middle)):
        offsets = (*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :])
        sizes = (*box.sizes[:dim], size, *box.sizes[dim + 1 :])
        halves.append((TensorSlice(offsets=offsets, sizes=sizes), out.narrow(dim, start, size)))
    return halves


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _bytes_of(spec: TensorSpec, tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major; a copy only where it is on a device or not contiguous."""
    if tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
        raise CheckpointError(
            f"{spec.key} was announced as {spec.dtype} {spec.shape}, but is {tensor.dtype} "
            f"{tuple(tensor.shape)}; do not change tensors while they are saved"
        )
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _checksum(data: memoryview) -> str:
    return f"{zlib.crc32(data):08x}"
