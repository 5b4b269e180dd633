"""Slices out of a source: only their bytes are read, checked, and put where the caller wants them.

Knows sources and tensors. Refuses to know who wrote the pieces, and to guess: a missing name, another shape
or another dtype is an error, never a silent cast or a silent part of a larger tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.checkpoint.manifest import Manifest, Piece, TensorEntry
from shardwise.checkpoint.slices import TensorSlice, plan_reads
from shardwise.checkpoint.source import Source, open_checkpoint
from shardwise.checkpoint.strict_json import DAMAGED
from shardwise.checkpoint.tensor_file import TORCH_DTYPES, TensorFile
from shardwise.errors import CheckpointError

__all__ = ["Target", "check_match", "load_into", "load_slices", "verify_checkpoint"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Where a slice goes: `out` has shape `region.sizes`, on any device; it may be a view."""

    name: str
    global_shape: tuple[int, ...]
    region: TensorSlice
    out: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Copy:
    """One box of one piece on its way into one view."""

    piece: Piece
    dtype: str
    box: TensorSlice
    out: torch.Tensor


def load_slices(
    source: Source | Path | str,
    wanted: Mapping[str, TensorSlice],
    *,
    global_shapes: Mapping[str, tuple[int, ...]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Name -> the wanted slice, in the saved dtype, with memory for little more than the result.

    `source` is an opened source, the folder of a step, or a folder of steps (the latest). Give
    `global_shapes` to make sure that the model is the one that was saved: without them a smaller model's
    slices fit a larger one. Raises CheckpointError that names tensor and numbers: missing, another shape,
    outside, damaged.
    """
    opened = source if isinstance(source, Source) else open_checkpoint(source)
    targets: list[Target] = []
    for name, region in wanted.items():
        entry = opened.entry(name)
        shape = (global_shapes or {}).get(name, entry.global_shape)
        _check_fit(name, entry, region, shape)
        out = torch.empty(region.sizes, dtype=TORCH_DTYPES[entry.dtype], device=device)
        targets.append(Target(name=name, global_shape=shape, region=region, out=out))
    load_into(opened, targets)
    return {target.name: target.out for target in targets}


def load_into(source: Source, targets: Iterable[Target], *, cast: bool = False) -> None:
    """Fill tensors in place, so that a model's own parameters need no second copy.

    With `cast`, values are converted to the dtype of `out` on the way; else another dtype is an error. All
    targets are checked before the first byte is copied.
    """
    by_file: dict[str, list[_Copy]] = {}
    for target in targets:
        entry = source.entry(target.name)
        _check_fit(target.name, entry, target.region, target.global_shape)
        _check_out(target, entry, cast=cast)
        for copy in _copies(target, entry):
            by_file.setdefault(copy.piece.file, []).append(copy)
    for file in sorted(by_file):
        with TensorFile(source.folder / file) as opened:
            for copy in by_file[file]:
                _check_stored(opened, copy.piece, copy.dtype, source.manifest)
                opened.read(
                    copy.piece.key,
                    copy.box,
                    copy.out,
                    checksums=copy.piece.crc32,
                    block_bytes=source.manifest.block_bytes,
                )


def check_match(
    source: Source,
    global_shapes: Mapping[str, tuple[int, ...]],
    *,
    kinds: Collection[str] = ("parameter",),
    allow_extra: bool = False,
) -> None:
    """Check that a source holds exactly these tensors, among those of the given kinds, with these shapes.

    Raises one CheckpointError that lists what is missing, what is extra, and which shapes differ, with
    numbers.
    """
    saved = {name: entry for name, entry in source.manifest.tensors.items() if entry.kind in kinds}
    missing = [f"{name} {shape}" for name, shape in global_shapes.items() if name not in saved]
    extra = [f"{name} {saved[name].global_shape}" for name in saved if name not in global_shapes]
    differing = [
        f"{name} {saved[name].global_shape} instead of {tuple(shape)}"
        for name, shape in global_shapes.items()
        if name in saved and saved[name].global_shape != tuple(shape)
    ]
    faults = [("missing", missing), ("extra", [] if allow_extra else extra), ("of another shape", differing)]
    told = [f"{len(names)} {fault}: {_some(names)}" for fault, names in faults if names]
    if told:
        raise CheckpointError(
            f"{source.folder} must hold the {len(global_shapes)} tensors of the model, but has "
            f"{'; '.join(told)}; load the checkpoint of this model, or build the model that was saved"
        )


def verify_checkpoint(root_or_step: Path | str) -> int:
    """Read all bytes of a checkpoint against their checksums; returns how many. CheckpointError on damage."""
    source = open_checkpoint(root_or_step)
    manifest = source.manifest
    pieces = [(piece, entry.dtype) for entry in manifest.tensors.values() for piece in entry.pieces]
    num_bytes = 0
    for file in sorted({piece.file for piece, _ in pieces}):
        with TensorFile(source.folder / file) as opened:
            for piece, dtype in pieces:
                if piece.file == file:
                    _check_stored(opened, piece, dtype, manifest)
                    num_bytes += opened.check(piece.key, checksums=piece.crc32, block_bytes=manifest.block_bytes)
    return num_bytes


def _copies(target: Target, entry: TensorEntry) -> list[_Copy]:
    out = target.out.detach()
    copies: list[_Copy] = []
    for read in plan_reads(target.name, [piece.region for piece in entry.pieces], target.region):
        view = out
        for dim, (start, size) in enumerate(zip(read.target.offsets, read.target.sizes, strict=True)):
            view = view.narrow(dim, start, size)
        copies.append(_Copy(piece=entry.pieces[read.piece], dtype=entry.dtype, box=read.source, out=view))
    return copies


def _check_fit(name: str, entry: TensorEntry, region: TensorSlice, global_shape: tuple[int, ...]) -> None:
    if tuple(global_shape) != entry.global_shape:
        raise CheckpointError(
            f"{name} must have its saved shape {entry.global_shape}, but the model has "
            f"{tuple(global_shape)}; build the model that was saved, or load another checkpoint"
        )
    if not region.is_inside(entry.global_shape):
        raise CheckpointError(
            f"a wanted slice lies inside its tensor, but {region} of {name} leaves the saved shape "
            f"{entry.global_shape}; correct the slice"
        )


def _check_out(target: Target, entry: TensorEntry, *, cast: bool) -> None:
    if tuple(target.out.shape) != target.region.sizes or target.out.is_meta:
        raise CheckpointError(
            f"the tensor to fill has the sizes of its slice and storage, but {target.name} {target.region} "
            f"goes to shape {tuple(target.out.shape)} on {target.out.device}; allocate {target.region.sizes}"
        )
    if target.out.dtype != TORCH_DTYPES[entry.dtype] and not cast:
        raise CheckpointError(
            f"{target.name} was saved as {entry.dtype} and the tensor to fill is {target.out.dtype}; use the "
            "saved dtype, or ask for the conversion with cast=True"
        )


def _check_stored(file: TensorFile, piece: Piece, dtype: str, manifest: Manifest) -> None:
    """The file's own header must agree with what the manifest says of the piece."""
    stored = file.tensors.get(piece.key)
    if stored is None or stored.spec.shape != piece.region.sizes or stored.spec.dtype != dtype:
        found = "nothing" if stored is None else f"{stored.spec.dtype} {stored.spec.shape}"
        raise CheckpointError(
            f"{file.path} must hold {piece.key} as {dtype} {piece.region.sizes}, but holds {found}; {DAMAGED}"
        )
    num_blocks = -(-stored.spec.num_bytes // manifest.block_bytes)
    if piece.crc32 and len(piece.crc32) != 8 * num_blocks:
        raise CheckpointError(
            f"{piece.key} in {file.path} has {num_blocks} blocks, but {len(piece.crc32) // 8} checksums; {DAMAGED}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
