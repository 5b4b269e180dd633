"""Any Python value as an anonymous file in memory that several processes map: how calls and results travel.

    file = | num_parts | (offset, length) of each part | pickle | bytes of a tensor | bytes of an array | ...

The pickle is cloudpickle's, so that functions and classes of scripts and notebooks travel by value. The bytes
of tensors and arrays stand beside it, once, whatever the number of processes that read them; they are mapped
copy-on-write, so a reader may write into its tensors and nobody else sees it. Tensors that share memory still
do. It knows no process and no socket. It is spoken between our own processes only: never to a file on disk.
"""

from __future__ import annotations

import importlib
import io
import mmap
import os
import pickle
import struct
import sys
from collections.abc import Sequence
from contextvars import ContextVar

import cloudpickle
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from shardwise.errors import LaunchError

__all__ = ["pack", "unpack"]

_WORD = struct.Struct("<Q")
_PAIR = struct.Struct("<QQ")
_ALIGNMENT = 64  # bytes: what vector instructions like


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """cloudpickle with the bytes of CPU tensors out of band, shared storages written once."""

    def reducer_override(self, obj: object) -> object:
        if type(obj) is torch.storage.TypedStorage and obj._untyped_storage.device.type == "cpu":
            return _typed_storage, (obj._untyped_storage, obj.dtype)
        if type(obj) is torch.UntypedStorage and obj.device.type == "cpu":
            return _storage_over, (pickle.PickleBuffer(_bytes_of(obj)),)
        if isinstance(obj, torch.nn.Module) and is_parametrized(obj):
            content = {**vars(obj), "parametrizations": obj.parametrizations}
            return _bare, (type_before_parametrizations(obj),), content, None, None, _parametrize
        name = _name_of_global(obj)
        if name is not None:
            return _global, (type(obj).__module__, name)
        return super().reducer_override(obj)


def _bare(cls: type[torch.nn.Module]) -> torch.nn.Module:
    return cls.__new__(cls)


def _parametrize(module: torch.nn.Module, content: dict[str, object]) -> None:
    """Fill a module whose tensors are computed by parametrizations (weight_norm): its class is made when it is."""
    module.__dict__.update(content)
    module.__dict__.pop("parametrizations", None)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)


def _name_of_global(obj: object) -> str | None:
    """The name of an object that belongs to its process (it holds a context variable) and stands in its module."""
    held = getattr(obj, "__dict__", None)
    if not isinstance(held, dict) or not any(type(value) is ContextVar for value in held.values()):
        return None
    module = sys.modules.get(type(obj).__module__)
    found = [name for name, value in vars(module).items() if value is obj] if module is not None else []
    return found[0] if found else None


def _global(module: str, name: str) -> object:
    return getattr(importlib.import_module(module), name)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)  # (bytes,), the storage's own memory
    return flat.numpy().data


def _storage_over(buffer: memoryview) -> torch.UntypedStorage:
    if len(buffer) == 0:
        return torch.empty(0, dtype=torch.uint8).untyped_storage()
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def _typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def pack(value: object) -> int:
    """Writes `value` into a new anonymous file and returns its descriptor, which the caller closes.

    The file's pages belong to no process, so the writer's own memory does not grow by them. LaunchError names
    what cannot be pickled.
    """
    body = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    try:
        _Pickler(body, protocol=5, buffer_callback=buffers.append).dump(value)
    except Exception as error:
        raise LaunchError(
            f"{type(value).__name__} cannot travel between processes: {type(error).__name__}: {error}; "
            "keep open files, locks, generators and process groups out of what is sent"
        ) from error
    parts = [body.getbuffer(), *(buffer.raw() for buffer in buffers)]
    descriptor = os.memfd_create("shardwise")
    try:
        _write(descriptor, parts)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int, parts: Sequence[memoryview]) -> None:
    offset = _WORD.size + _PAIR.size * len(parts)
    table = [_WORD.pack(len(parts))]
    offsets = []
    for part in parts:
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        offsets.append(offset)
        table.append(_PAIR.pack(offset, part.nbytes))
        offset += part.nbytes
    os.truncate(descriptor, offset)
    _write_at(descriptor, memoryview(b"".join(table)), 0)
    for part, start in zip(parts, offsets, strict=True):
        _write_at(descriptor, part, start)


def _write_at(descriptor: int, part: memoryview, offset: int) -> None:
    while part.nbytes:  # one call writes at most 2 GiB
        written = os.pwrite(descriptor, part, offset)
        part, offset = part[written:], offset + written


def unpack(descriptor: int) -> object:
    """The value of a file made by `pack`; the caller closes the descriptor, the value outlives it."""
    view = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    (num_parts,) = _WORD.unpack_from(view, 0)
    spans = [_PAIR.unpack_from(view, _WORD.size + _PAIR.size * part) for part in range(num_parts)]
    body, *buffers = (view[offset : offset + length] for offset, length in spans)
    value: object = pickle.loads(body, buffers=buffers)
    return value
