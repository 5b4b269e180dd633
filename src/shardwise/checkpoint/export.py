"""A checkpoint, or any source, written as a plain safetensors model that other tools open.

Knows sources and the file names of the ecosystem. Refuses to know models: names and shapes go out as they
are. Memory holds one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch

from shardwise.checkpoint.disk import disk_errors, replace_file, sync_folder, temporary_name
from shardwise.checkpoint.header import TensorSpec
from shardwise.checkpoint.load import Target, load_into
from shardwise.checkpoint.manifest import BLOCK_BYTES
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import Source
from shardwise.checkpoint.tensor_file import TORCH_DTYPES, write_tensors
from shardwise.errors import CheckpointError

__all__ = ["export_safetensors"]


def export_safetensors(
    source: Source,
    folder: Path | str,
    *,
    max_file_bytes: int = 5_000_000_000,
    kinds: Collection[str] = ("parameter", "buffer"),
    dtype: str | None = None,
) -> tuple[Path, ...]:
    """Write model.safetensors, or numbered shards and model.safetensors.index.json where one file would be
    too large.

    A file is larger than `max_file_bytes` only where a single tensor is. `dtype` converts floating point
    tensors ("bfloat16"); others keep theirs. Returns the files written, the index last. Raises
    CheckpointError when the source has no such tensors or the folder already holds safetensors files.
    """
    folder = Path(folder)
    specs = [
        TensorSpec(key=name, dtype=_exported_dtype(entry.dtype, dtype), shape=entry.global_shape)
        for name, entry in source.manifest.tensors.items()
        if entry.kind in kinds
    ]
    _check_places(source, specs, folder, kinds)
    groups = _split(specs, max_file_bytes)
    names = [
        "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        for number in range(1, len(groups) + 1)
    ]
    for name, group in zip(names, groups, strict=True):
        _write_file(source, folder / name, group)
    if len(groups) == 1:
        return (folder / names[0],)
    index = folder / "model.safetensors.index.json"
    replace_file(index, _index(names, groups))
    return (*(folder / name for name in names), index)


def _check_places(source: Source, specs: list[TensorSpec], folder: Path, kinds: Collection[str]) -> None:
    if not specs:
        raise CheckpointError(
            f"an exported model has tensors, but {source.folder} holds none of kind {', '.join(kinds)}; "
            "give another checkpoint or other kinds"
        )
    with disk_errors("make", folder):
        folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in folder.glob("*.safetensors*"))
    if present:
        raise CheckpointError(
            f"a model is exported into a folder without one, but {folder} holds {len(present)} such files, "
            f"{present[0]} among them; give an empty folder"
        )


def _split(specs: list[TensorSpec], max_file_bytes: int) -> list[list[TensorSpec]]:
    """The tensors in their order, cut into files of at most `max_file_bytes`."""
    groups: list[list[TensorSpec]] = []
    room = -1
    for spec in specs:
        if spec.num_bytes > room or not groups:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(spec)
        room -= spec.num_bytes
    return groups


def _write_file(source: Source, path: Path, specs: list[TensorSpec]) -> None:
    temporary = path.with_name(temporary_name(path.name))
    write_tensors(temporary, [(spec, partial(_load, source, spec)) for spec in specs], block_bytes=BLOCK_BYTES)
    with disk_errors("write", path):
        os.replace(temporary, path)
        sync_folder(path.parent)


def _load(source: Source, spec: TensorSpec) -> torch.Tensor:
    out = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    region = TensorSlice.whole(spec.shape)
    load_into(source, [Target(name=spec.key, global_shape=spec.shape, region=region, out=out)], cast=True)
    return out


def _index(names: list[str], groups: list[list[TensorSpec]]) -> bytes:
    specs = [spec for group in groups for spec in group]
    metadata = {
        "total_parameters": sum(math.prod(spec.shape) for spec in specs),
        "total_size": sum(spec.num_bytes for spec in specs),
    }
    weight_map = {spec.key: name for name, group in zip(names, groups, strict=True) for spec in group}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()


def _exported_dtype(saved: str, asked: str | None) -> str:
    if asked is None or not TORCH_DTYPES[saved].is_floating_point:
        return saved
    if asked not in TORCH_DTYPES or not TORCH_DTYPES[asked].is_floating_point:
        raise CheckpointError(
            f"tensors are exported as a floating point dtype such as bfloat16, got {asked!r}; use one"
        )
    return asked
