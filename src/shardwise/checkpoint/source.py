"""What can be loaded from, as one value: a checkpoint of ours, or a plain safetensors model of anybody.

Knows folders, manifests and headers. Refuses to know torch and to open pickled files. A plain model looks
like a checkpoint whose every tensor is one piece without checksum.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardwise.checkpoint.disk import check_file, disk_errors
from shardwise.checkpoint.header import StoredTensor, read_header
from shardwise.checkpoint.manifest import Manifest, Piece, TensorEntry
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.storage import MANIFEST, latest
from shardwise.checkpoint.strict_json import parse_object
from shardwise.errors import CheckpointError

__all__ = ["Source", "open_checkpoint", "open_safetensors"]

_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder and what it holds. Nothing of a tensor has been read yet."""

    folder: Path
    manifest: Manifest

    def entry(self, name: str) -> TensorEntry:
        """The tensor of this name. Raises CheckpointError with the closest names when there is none."""
        tensors = self.manifest.tensors
        if name not in tensors:
            close = difflib.get_close_matches(name, tensors, n=3, cutoff=0.5)
            raise CheckpointError(
                f"{self.folder} holds {len(tensors)} tensors, but no {name}; "
                + (f"close to it are {', '.join(close)}" if close else "give a checkpoint of this model")
            )
        return tensors[name]

    def renamed(self, names: Mapping[str, str]) -> Source:
        """The same source under the caller's names: name -> saved name. Two may share a tensor (ties)."""
        tensors = {name: self.entry(saved) for name, saved in names.items()}
        return Source(folder=self.folder, manifest=replace(self.manifest, tensors=tensors))


def open_checkpoint(root_or_step: Path | str) -> Source:
    """Open a checkpoint: the folder of a step, or a folder of steps, of which the latest is taken."""
    path = Path(root_or_step)
    folder = path if (path / MANIFEST).is_file() else latest(path)
    check_file(folder / MANIFEST)
    with disk_errors("read", folder / MANIFEST):
        data = (folder / MANIFEST).read_bytes()
    return Source(folder=folder, manifest=Manifest.from_bytes(data, path=folder / MANIFEST))


def open_safetensors(path: Path | str) -> Source:
    """Open a plain model: a folder with model.safetensors or model.safetensors.index.json, or one of these
    files.

    Reads headers only. Every tensor counts as a parameter. Raises CheckpointError when there is no such file,
    a shard is missing, or index and shards disagree.
    """
    path = Path(path)
    if path.is_dir():
        path = _model_file(path)
    if path.name.endswith(".index.json"):
        stored = _indexed_tensors(path)
    else:
        stored = {name: (path.name, tensor) for name, tensor in read_header(path).items()}
    tensors = {name: _whole_entry(file, tensor) for name, (file, tensor) in stored.items()}
    return Source(folder=path.parent, manifest=Manifest(step=0, tensors=tensors))


def _model_file(folder: Path) -> Path:
    for name in (_MODEL, _INDEX):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    raise CheckpointError(
        f"a model folder holds {_MODEL} or {_INDEX}, but {folder} has neither ({len(files)} other "
        "safetensors files); "
        + ("pickled weights are never opened: convert them" if pickled else "give the right folder")
    )


def _indexed_tensors(path: Path) -> dict[str, tuple[str, StoredTensor]]:
    """Name -> (file, tensor) by an index file."""
    check_file(path)
    with disk_errors("read", path):
        weight_map = parse_object(path.read_bytes(), path=path).record("weight_map")
    files = {name: weight_map.text(name) for name in weight_map.fields}
    for name, file in files.items():
        if Path(file).name != file:
            weight_map.refuse(name, rule="must be the plain name of a file beside the index")
    headers = {file: read_header(path.parent / file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in headers[file]:
            weight_map.refuse(name, rule=f"must name the file that holds it, and {file} does not")
    return {name: (file, headers[file][name]) for name, file in files.items()}


def _whole_entry(file: str, tensor: StoredTensor) -> TensorEntry:
    spec = tensor.spec
    piece = Piece(file=file, key=spec.key, region=TensorSlice.whole(spec.shape))
    return TensorEntry(kind="parameter", global_shape=spec.shape, dtype=spec.dtype, pieces=(piece,))
