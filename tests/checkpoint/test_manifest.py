"""The manifest: JSON there and back, and every malformed one is a CheckpointError with file and field."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.checkpoint.manifest import Manifest, Piece, TensorEntry, merge_entries
from shardwise.checkpoint.slices import TensorSlice
from shardwise.errors import CheckpointError

PATH = Path("runs/step_20/manifest.json")


def piece(start: int, stop: int, *, file: str = "rank_0.safetensors") -> Piece:
    region = TensorSlice(offsets=(start, 0), sizes=(stop - start, 3))
    return Piece(file=file, key=f"w{region}", region=region, crc32="0123abcd")


def entry(*pieces: Piece, dtype: str = "float32") -> TensorEntry:
    return TensorEntry(kind="parameter", global_shape=(4, 3), dtype=dtype, pieces=pieces)


def manifest() -> Manifest:
    state = {"seed": 7, "layout": "dp=2,pp=2", "sampler": {"step": 20}, "losses": [1.5, 0.1], "done": None}
    return Manifest(step=20, tensors={"w": entry(piece(0, 2), piece(2, 4))}, state=state)


def with_checksum(outer: dict[str, Any]) -> bytes:
    """The manifest of somebody who edits the content and its checksum too."""
    text = json.dumps(outer["content"], sort_keys=True, separators=(",", ":"))
    return json.dumps({**outer, "crc32": f"{zlib.crc32(text.encode()):08x}"}).encode()


def test_a_manifest_comes_back_equal() -> None:
    assert Manifest.from_bytes(manifest().to_bytes(), path=PATH) == manifest()


def test_the_text_may_be_laid_out_anew() -> None:
    compact = json.dumps(json.loads(manifest().to_bytes()), sort_keys=True).encode()
    assert Manifest.from_bytes(compact, path=PATH) == manifest()


def test_a_changed_number_is_found_by_the_checksum() -> None:
    data = manifest().to_bytes()
    assert b'"seed": 7' in data
    with pytest.raises(CheckpointError, match=r"step_20/manifest.json: field crc32 must be"):
        Manifest.from_bytes(data.replace(b'"seed": 7', b'"seed": 6'), path=PATH)


def edit(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(outer: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        at: Any = outer
        for key in parents:
            at = at[int(key)] if isinstance(at, list) else at[key]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return apply


@pytest.mark.parametrize(
    "path, value, complaint",
    [
        ("format", "zip", "field format must be 'shardwise checkpoint', got 'zip'"),
        ("version", 2, "version 2 of the format, and this shardwise reads version 1"),
        ("extra", 1, "field extra is unknown"),
        ("content", [], "field content must be an object"),
        ("content.step", -1, "field content.step must be a whole number"),
        ("content.step", True, "field content.step must be a whole number"),
        ("content.step", None, "field content.step must be there"),
        ("content.block_bytes", 8, "block_bytes a multiple of 16"),
        ("content.state", [1], "field content.state must be an object"),
        ("content.tensors.w", 3, "field content.tensors.w must be an object"),
        ("content.tensors.w.kind", "hope", "field content.tensors.w.kind must be one of parameter"),
        ("content.tensors.w.dtype", "float31", "field content.tensors.w.dtype must be one of float64"),
        (
            "content.tensors.w.global_shape",
            [4, "3"],
            "content.tensors.w.global_shape must be a list of whole",
        ),
        ("content.tensors.w.global_shape", [6, 3], r"\[4:6, 0:3\] of w with shape \(6, 3\)"),
        ("content.tensors.w.pieces", {}, "content.tensors.w.pieces must be a list of objects"),
        ("content.tensors.w.pieces.0.file", "../secret", "a plain file name"),
        ("content.tensors.w.pieces.0.file", 3, r"pieces\[0\].file must be a string"),
        ("content.tensors.w.pieces.0.crc32", "zz", "8 hex digits"),
        ("content.tensors.w.pieces.1.sizes", None, r"pieces\[1\].sizes must be there"),
        ("content.tensors.w.pieces.1.sizes", [2], "one offset and one size"),
    ],
)
def test_a_malformed_field_is_named(path: str, value: object, complaint: str) -> None:
    outer = json.loads(manifest().to_bytes())
    edit(path, value)(outer)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Manifest.from_bytes(with_checksum(outer), path=PATH)
    assert str(PATH) in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 200_000, b"9" * 5000, b"null"],
)
def test_what_is_no_manifest_is_refused_by_its_file_name(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"step_20/manifest.json"):
        Manifest.from_bytes(data, path=PATH)


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": float("nan")}, {"a": {1: 2}}, {"a": {2}}, {"a": b"x"}])
def test_a_state_that_json_would_change_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        Manifest(step=0, tensors={}, state=state)


def test_ranks_merge_and_of_replicas_the_first_is_kept() -> None:
    replica = piece(2, 4, file="rank_2.safetensors")
    merged = merge_entries(
        [
            {"w": entry(piece(0, 2))},
            {"w": entry(piece(2, 4, file="rank_1.safetensors"))},
            {"w": entry(replica)},
        ]
    )
    assert [each.file for each in merged["w"].pieces] == ["rank_0.safetensors", "rank_1.safetensors"]


def test_ranks_that_disagree_on_a_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match="w is parameter float32 .* on one and parameter bfloat16"):
        merge_entries([{"w": entry(piece(0, 2))}, {"w": entry(piece(2, 4), dtype="bfloat16")}])
