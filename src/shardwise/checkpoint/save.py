"""One rank's tensors into one file, and a whole save for a single process.

Knows tensors, names and slices. Refuses to know who else saves: see `storage` for the order of the calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from shardwise.checkpoint.disk import disk_errors, sync_folder
from shardwise.checkpoint.header import TensorSpec
from shardwise.checkpoint.manifest import BLOCK_BYTES, Piece, TensorEntry
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.storage import begin, commit
from shardwise.checkpoint.tensor_file import write_tensors
from shardwise.errors import CheckpointError

__all__ = ["Shard", "save_checkpoint", "write_rank"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """A slice of a named tensor, with its values. A rank may give several of one name (packed projections).

    `tensor` has shape `region.sizes`, on any device; `kind` is one of `manifest.KINDS`. Raises
    CheckpointError when the shape is another, the region leaves the global shape, or the tensor has no
    storage.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    region: TensorSlice
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        if tuple(self.tensor.shape) != self.region.sizes or not self.region.is_inside(self.global_shape):
            raise CheckpointError(
                f"a shard has the sizes of its slice inside the global shape, but {self.name} has shape "
                f"{tuple(self.tensor.shape)} for slice {self.region} of {self.global_shape}; correct the "
                "slice"
            )
        if self.tensor.is_meta:
            raise CheckpointError(f"{self.name} has no values to save (device meta); save it where it is present")

    @classmethod
    def whole(cls, name: str, tensor: torch.Tensor, *, kind: str = "parameter") -> Shard:
        """The shard that is all of its tensor."""
        shape = tuple(tensor.shape)
        return cls(name=name, kind=kind, global_shape=shape, region=TensorSlice.whole(shape), tensor=tensor)

    @property
    def key(self) -> str:
        """The name in the file: "w" for the whole tensor, else "w[0:2, 0:6]"."""
        is_whole = self.region.sizes == self.global_shape
        return self.name if is_whole else f"{self.name}{self.region}"

    @property
    def spec(self) -> TensorSpec:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return TensorSpec(key=self.key, dtype=dtype, shape=self.region.sizes)


def write_rank(folder: Path, rank: int, shards: Iterable[Shard]) -> dict[str, TensorEntry]:
    """Write what this rank saves to `rank_<rank>.safetensors` in the folder that `begin` made.

    Returns name -> entry with this rank's pieces, for `commit`: plain values that can be sent to another
    process. Empty shards make no piece. Raises CheckpointError when shards contradict each other or the disk
    refuses.
    """
    given = list(shards)
    file = f"rank_{rank}.safetensors"
    entries: dict[str, TensorEntry] = {}
    for shard in given:
        _check_agree(shard, entries.setdefault(shard.name, _entry(shard)), rank=rank)
    filled = [shard for shard in given if shard.region.num_elements]
    if filled:
        tensors = [(shard.spec, partial(_values, shard)) for shard in filled]
        checksums = write_tensors(folder / file, tensors, block_bytes=BLOCK_BYTES)
        with disk_errors("write", folder):
            sync_folder(folder)
    for shard in filled:
        piece = Piece(file=file, key=shard.key, region=shard.region, crc32=checksums[shard.key])
        entry = entries[shard.name]
        entries[shard.name] = replace(entry, pieces=(*entry.pieces, piece))
    return entries


def save_checkpoint(root: Path | str, step: int, shards: Iterable[Shard], *, state: Mapping[str, object]) -> Path:
    """The whole save of a single process: begin, write, commit. Returns the folder of the step."""
    folder = begin(root, step)
    return commit(folder, [write_rank(folder, 0, shards)], state=state)


def _values(shard: Shard) -> torch.Tensor:
    return shard.tensor


def _entry(shard: Shard) -> TensorEntry:
    """The entry of a shard's tensor, without pieces."""
    return TensorEntry(kind=shard.kind, global_shape=shard.global_shape, dtype=shard.spec.dtype, pieces=())


def _check_agree(shard: Shard, known: TensorEntry, *, rank: int) -> None:
    if known != _entry(shard):
        raise CheckpointError(
            f"all shards of {shard.name} on rank {rank} must agree, but one is {known.kind} {known.dtype} "
            f"{known.global_shape} and one {shard.kind} {shard.spec.dtype} {shard.global_shape}; correct them"
        )
