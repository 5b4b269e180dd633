"""A checkpoint, or any source, written as a plain safetensors model that other tools open.

Knows sources and the file names of the ecosystem. Refuses to know models: names and shapes go out as they are, or as
whoever asks says of each group of tensors. Memory holds a few groups at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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

__all__ = ["Group", "export_safetensors"]

_GROUPS_HELD = 4  # of which a file may ask in turns


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Tensors of a source that are written together: `convert` gives them their names and shapes in the files.

    It is called with tensors without values too (on meta), and must give the same names and shapes then.
    """

    names: tuple[str, ...]
    convert: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] = dict


def export_safetensors(
    source: Source,
    folder: Path | str,
    *,
    max_file_bytes: int = 5_000_000_000,
    kinds: Collection[str] = ("parameter", "buffer"),
    dtype: str | None = None,
    groups: Sequence[Group] | None = None,
) -> tuple[Path, ...]:
    """Write model.safetensors, or numbered shards and model.safetensors.index.json where one file would be
    too large.

    A file is larger than `max_file_bytes` only where a single tensor is. `dtype` converts floating point
    tensors ("bfloat16"); others keep theirs. `groups` say which tensors are written, and how; without
    them all of `kinds` as they are. Returns the files written, the index last. Raises CheckpointError when
    the source has no such tensors or the folder already holds safetensors files.
    """
    folder = Path(folder)
    wanted = groups
    if wanted is None:
        wanted = [Group(names=(name,)) for name, entry in source.manifest.tensors.items() if entry.kind in kinds]
    maker = _Maker(source, wanted, dtype)
    _check_places(source, maker.specs, folder, kinds)
    files = _split(maker.specs, max_file_bytes)
    names = [
        "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        for number in range(1, len(files) + 1)
    ]
    for name, specs in zip(names, files, strict=True):
        _write_file(maker, folder / name, specs)
    if len(files) == 1:
        return (folder / names[0],)
    index = folder / "model.safetensors.index.json"
    replace_file(index, _index(names, files))
    return (*(folder / name for name in names), index)


def _check_places(source: Source, specs: Sequence[TensorSpec], folder: Path, kinds: Collection[str]) -> None:
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


def _split(specs: Sequence[TensorSpec], max_file_bytes: int) -> list[list[TensorSpec]]:
    """The tensors in their order, cut into files of at most `max_file_bytes`."""
    files: list[list[TensorSpec]] = []
    room = -1
    for spec in specs:
        if spec.num_bytes > room or not files:
            files.append([])
            room = max_file_bytes
        files[-1].append(spec)
        room -= spec.num_bytes
    return files


def _write_file(maker: _Maker, path: Path, specs: list[TensorSpec]) -> None:
    temporary = path.with_name(temporary_name(path.name))
    write_tensors(temporary, [(spec, partial(maker.make, spec.key)) for spec in specs], block_bytes=BLOCK_BYTES)
    with disk_errors("write", path):
        os.replace(temporary, path)
        sync_folder(path.parent)


class _Maker:
    """Makes what is written, a group at a time: those that were made last are kept, for a file may take turns."""

    def __init__(self, source: Source, groups: Sequence[Group], dtype: str | None) -> None:
        self._source = source
        self._dtype = dtype
        self._of: dict[str, Group] = {}
        self._held: dict[Group, Mapping[str, torch.Tensor]] = {}
        self.specs: list[TensorSpec] = []
        for group in groups:
            for name, tensor in self._converted(group, torch.device("meta")).items():
                if name in self._of:
                    raise CheckpointError(f"a file has every name once, but {name} is made twice; correct the groups")
                self._of[name] = group
                dtype_of = str(tensor.dtype).removeprefix("torch.")
                self.specs.append(TensorSpec(key=name, dtype=dtype_of, shape=tuple(tensor.shape)))

    def make(self, name: str) -> torch.Tensor:
        group = self._of[name]
        if group not in self._held:
            while len(self._held) >= _GROUPS_HELD:
                self._held.pop(next(iter(self._held)))
            self._held[group] = self._converted(group, torch.device("cpu"))
        made = self._held[group][name]
        if len(self._held[group]) == 1:  # nobody asks again
            del self._held[group]
        return made

    def _converted(self, group: Group, device: torch.device) -> Mapping[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        targets: list[Target] = []
        for name in group.names:
            entry = self._source.entry(name)
            dtype = TORCH_DTYPES[_exported_dtype(entry.dtype, self._dtype)]
            tensors[name] = out = torch.empty(entry.global_shape, dtype=dtype, device=device)
            region = TensorSlice.whole(entry.global_shape)
            targets.append(Target(name=name, global_shape=entry.global_shape, region=region, out=out))
        if device.type != "meta":
            load_into(self._source, targets, cast=True)
        return group.convert(tensors)


def _index(names: list[str], files: list[list[TensorSpec]]) -> bytes:
    specs = [spec for group in files for spec in group]
    metadata = {
        "total_parameters": sum(math.prod(spec.shape) for spec in specs),
        "total_size": sum(spec.num_bytes for spec in specs),
    }
    weight_map = {spec.key: name for name, group in zip(names, files, strict=True) for spec in group}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()


def _exported_dtype(saved: str, asked: str | None) -> str:
    if asked is None or not TORCH_DTYPES[saved].is_floating_point:
        return saved
    if asked not in TORCH_DTYPES or not TORCH_DTYPES[asked].is_floating_point:
        raise CheckpointError(
            f"tensors are exported as a floating point dtype such as bfloat16, got {asked!r}; use one"
        )
    return asked
