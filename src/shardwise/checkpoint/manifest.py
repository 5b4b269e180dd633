"""The manifest of a checkpoint: which tensors it holds, in which pieces, in which files, and the run's own
state.

Knows names, shapes, slices and checksums. Refuses to know torch, layouts, and what `state` means. On disk:

    {"format": "shardwise checkpoint", "version": 1, "crc32": "89abcdef",
     "content": {"step": 20, "block_bytes": 1048576, "state": {...},
                 "tensors": {"w": {"kind": "parameter", "global_shape": [4, 6], "dtype": "float32",
                                   "pieces": [{"file": "rank_0.safetensors", "key": "w[0:2, 0:6]",
                                               "offsets": [0, 0], "sizes": [2, 6], "crc32": "0123abcd"}]}}}}

The outer crc32 is of the content's canonical text; a piece's is 8 hex digits for each block of `block_bytes`
of its bytes, so that a part of a piece can be read and checked without reading all of it.
"""

from __future__ import annotations

import json
import string
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.checkpoint.header import ITEM_BYTES
from shardwise.checkpoint.slices import TensorSlice, check_cover
from shardwise.checkpoint.strict_json import Record, parse_object
from shardwise.errors import CheckpointError

__all__ = ["BLOCK_BYTES", "KINDS", "Manifest", "Piece", "TensorEntry", "merge_entries"]

BLOCK_BYTES = 1 << 20  # bytes under one checksum: the most that is read beside a wanted range, at each end
KINDS = ("parameter", "buffer", "optimizer", "other")

_FORMAT, _VERSION = "shardwise checkpoint", 1
_LONGEST_NAME = 255  # characters that file systems take


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A slice of a tensor in a file: `file` is a plain name beside the manifest, `key` the name inside it.

    `crc32` holds 8 lower-case hex digits for each block of bytes; empty where nobody wrote checksums.
    """

    file: str
    key: str
    region: TensorSlice
    crc32: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.file) <= _LONGEST_NAME or self.file in (".", "..") or set(self.file) & set("/\\\0"):
            raise CheckpointError(
                f"a piece lies beside its manifest, but its file is {self.file!r:.80}; give a plain file name"
            )
        if len(self.crc32) % 8 or set(self.crc32) - set(string.hexdigits.lower()):
            raise CheckpointError(
                f"crc32 of {self.key} must be 8 hex digits a block, got {self.crc32[:20]!r}; save it again"
            )

    def to_json(self) -> dict[str, object]:
        offsets, sizes = list(self.region.offsets), list(self.region.sizes)
        return {"file": self.file, "key": self.key, "offsets": offsets, "sizes": sizes, "crc32": self.crc32}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a checkpoint. `dtype` is torch's name ("bfloat16"), `kind` one of KINDS."""

    kind: str
    global_shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CheckpointError(f"a tensor's kind is one of {', '.join(KINDS)}, got {self.kind!r}; use one of them")
        if self.dtype not in ITEM_BYTES:
            raise CheckpointError(f"a tensor's dtype is one of {', '.join(ITEM_BYTES)}, got {self.dtype!r}; convert it")

    def to_json(self) -> dict[str, object]:
        pieces = [piece.to_json() for piece in self.pieces]
        return {
            "kind": self.kind,
            "global_shape": list(self.global_shape),
            "dtype": self.dtype,
            "pieces": pieces,
        }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a checkpoint says about itself. `state` is free JSON of the run (seed, sampler position, ...).

    Raises CheckpointError where the pieces of a tensor do not cover it, or `state` is not plain JSON.
    """

    step: int
    tensors: Mapping[str, TensorEntry]
    state: Mapping[str, object] = field(default_factory=dict)
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        if self.step < 0 or self.block_bytes < 16 or self.block_bytes % 16:
            raise CheckpointError(
                f"step is 0 or more and block_bytes a multiple of 16, got step={self.step} and "
                f"block_bytes={self.block_bytes}; correct them"
            )
        for name, entry in self.tensors.items():
            check_cover(name, entry.global_shape, (piece.region for piece in entry.pieces))
        _check_state(self.state)

    def to_bytes(self) -> bytes:
        """The text of the manifest file, UTF-8."""
        content: dict[str, object] = {
            "step": self.step,
            "block_bytes": self.block_bytes,
            "state": dict(self.state),
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
        }
        outer = {"format": _FORMAT, "version": _VERSION, "crc32": _checksum(content), "content": content}
        return (json.dumps(outer, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, path: Path) -> Manifest:
        """The manifest read from `path`. Raises CheckpointError that names file, field and repair."""
        outer = parse_object(data, path=path)
        _check_version(outer)
        outer.only("format", "version", "crc32", "content")
        content = outer.record("content")
        if outer.text("crc32") != _checksum(content.fields):
            outer.refuse("crc32", rule=f"must be {_checksum(content.fields)}, the checksum of the content")
        content.only("step", "block_bytes", "state", "tensors")
        tensors = content.record("tensors")
        try:
            return cls(
                step=content.integer("step"),
                block_bytes=content.integer("block_bytes"),
                state=content.record("state").fields,
                tensors={name: _parse_entry(tensors.record(name)) for name in tensors.fields},
            )
        except CheckpointError as error:
            raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error


def merge_entries(of_ranks: Iterable[Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """One entry for each tensor out of what every rank wrote, lowest rank first.

    A slice that several ranks wrote is kept from the first. Raises CheckpointError where ranks disagree on a
    tensor's kind, shape or dtype.
    """
    merged: dict[str, TensorEntry] = {}
    pieces: dict[str, dict[TensorSlice, Piece]] = {}
    for entries in of_ranks:
        for name, entry in entries.items():
            known = merged.setdefault(name, entry)
            if (known.kind, known.global_shape, known.dtype) != (entry.kind, entry.global_shape, entry.dtype):
                raise CheckpointError(
                    f"all ranks must agree on a tensor, but {name} is {known.kind} {known.dtype} "
                    f"{known.global_shape} on one and {entry.kind} {entry.dtype} {entry.global_shape} on "
                    "another; save it under one name with one global shape and dtype"
                )
            for piece in entry.pieces:
                pieces.setdefault(name, {}).setdefault(piece.region, piece)
    return {
        name: TensorEntry(
            kind=entry.kind,
            global_shape=entry.global_shape,
            dtype=entry.dtype,
            pieces=tuple(pieces.get(name, {}).values()),
        )
        for name, entry in merged.items()
    }


def _parse_entry(record: Record) -> TensorEntry:
    record.only("kind", "global_shape", "dtype", "pieces")
    if record.text("kind") not in KINDS:
        record.refuse("kind", rule=f"must be one of {', '.join(KINDS)}")
    if record.text("dtype") not in ITEM_BYTES:
        record.refuse("dtype", rule=f"must be one of {', '.join(ITEM_BYTES)}")
    return TensorEntry(
        kind=record.text("kind"),
        global_shape=record.integers("global_shape"),
        dtype=record.text("dtype"),
        pieces=tuple(_parse_piece(piece) for piece in record.records("pieces")),
    )


def _parse_piece(record: Record) -> Piece:
    record.only("file", "key", "offsets", "sizes", "crc32")
    region = TensorSlice(offsets=record.integers("offsets"), sizes=record.integers("sizes"))
    return Piece(file=record.text("file"), key=record.text("key"), region=region, crc32=record.text("crc32"))


def _check_version(outer: Record) -> None:
    if outer.fields.get("format") != _FORMAT:
        outer.refuse("format", rule=f"must be {_FORMAT!r}")
    version = outer.integer("version")
    if version != _VERSION:
        raise CheckpointError(
            f"{outer.path} has version {version} of the format, and this shardwise reads version {_VERSION}; "
            "use the shardwise that wrote it"
        )


def _checksum(content: Mapping[str, object]) -> str:
    """CRC-32 of the content with sorted keys and no spaces: independent of how the file is laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _check_state(state: Mapping[str, object]) -> None:
    repair = "use dicts with string keys, lists, strings, finite numbers, booleans and None"
    try:
        same = json.loads(json.dumps(dict(state), allow_nan=False)) == dict(state)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state of a checkpoint is plain JSON, but: {error}; {repair}") from error
    if not same:  # a tuple would come back as a list, an integer key as a string
        raise CheckpointError(f"the state of a checkpoint must come back from JSON unchanged; {repair}")
