"""Divided tensors in checkpoints: a rank's part as boxes of the whole tensor, so that any layout reads any other's.

    a shard's part of w        its elements 7 .. 15 are this rank's      boxes of w, each a view of the flat elements
        # # # # . . . .            . . . .                                   -
        # # # # . . . .            . . . #                                   [1:2, 3:4]
        # # # # . . . .            # # # #                                   [2:3, 0:4]
        # # # # . . . .            # # # .                                   [3:4, 0:3]

Knows a program's plan of shards, its states and the checkpoint's slices; refuses to know files and optimizers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from shardwise.checkpoint.load import Target
from shardwise.checkpoint.save import Shard
from shardwise.checkpoint.slices import TensorSlice, boxes_of_run
from shardwise.describe.tensor import Slice
from shardwise.execute.program import Program
from shardwise.parallel.states import State
from shardwise.parallel.tensor.boxes import Box, boxes
from shardwise.parallel.tensor.slices import whole_shape

__all__ = ["num_elements", "regions_of", "shards_of", "targets_of"]


def shards_of(
    program: Program, parameter: str, name: str, local: torch.Tensor, *, kind: str, state: State | None = None
) -> Iterator[Shard]:
    """What this rank writes under `name` of a tensor that is divided as `parameter` is (a moment of it, say).

    `state` says which elements of this rank's part `local` has, where these are not all.
    """
    cuts = _cuts(program, parameter)
    if local.dim() == 0:  # one number for all elements, such as a count of steps
        if all(rank == 0 for _, rank in cuts) and program.place.shard == 0:
            yield Shard.whole(name, local, kind=kind)
        return
    if not cuts and program.place.shard != 0:
        return
    shape, parts = _parts(local, cuts, state, owned=True)
    for region, tensor in parts:
        yield Shard(name=name, kind=kind, global_shape=shape, region=region, tensor=tensor)


def targets_of(
    program: Program, parameter: str, name: str, local: torch.Tensor, *, state: State | None = None
) -> Iterator[Target]:
    """Where this rank reads `name`, divided as `parameter` is, into `local`; `state` as above."""
    if local.dim() == 0:
        yield Target(name=name, global_shape=(), region=TensorSlice.whole(()), out=local)
        return
    shape, parts = _parts(local, _cuts(program, parameter), state, owned=False)
    for region, tensor in parts:
        yield Target(name=name, global_shape=shape, region=region, out=tensor)


def num_elements(program: Program, name: str, local: torch.Tensor) -> int:
    """Elements of the whole parameter of which `local` is this rank's part, held or absent."""
    return math.prod(_whole(tuple(local.shape), _cuts(program, name)))


def _cuts(program: Program, parameter: str) -> list[tuple[Slice, int]]:
    """How a parameter is divided, and which part is here: inside units among shards, along its experts."""
    place = program.place
    both = [(program.part_of(parameter), place.shard), (program.experts_of(parameter), place.expert)]
    return [(part, rank) for part, rank in both if part is not None]


def _whole(shape: tuple[int, ...], cuts: Sequence[tuple[Slice, int]]) -> tuple[int, ...]:
    for part, rank in cuts:
        shape = whole_shape(shape, part, rank)
    return shape


def _parts(
    local: torch.Tensor, cuts: Sequence[tuple[Slice, int]], state: State | None, *, owned: bool
) -> tuple[tuple[int, ...], list[tuple[TensorSlice, torch.Tensor]]]:
    """The shape of the whole tensor, and what is here of it: boxes, each with its view of `local`."""
    own_shape = tuple(local.shape)
    held = [(TensorSlice.whole(own_shape), local)]
    if state is not None and tuple(state.parameter.shape) != state.shape:  # its elements in a row
        own_shape, flat = state.shape, local.reshape(-1)
        runs = boxes_of_run(own_shape, state.start, state.start + flat.numel())
        pieces = flat.split([run.num_elements for run in runs])  # type: ignore[no-untyped-call]
        held = [(run, piece.view(run.sizes)) for run, piece in zip(runs, pieces, strict=True)]
    shape = _whole(own_shape, cuts)
    found: list[tuple[TensorSlice, torch.Tensor]] = []
    for region, own in regions_of(cuts, shape, owned=owned):
        box = TensorSlice(offsets=own, sizes=region.sizes)
        for run, tensor in held:
            shared = run.intersection(box)
            if shared is None:
                continue
            moved = zip(region.offsets, shared.relative_to(box).offsets, strict=True)
            offsets = tuple(start + further for start, further in moved)
            found.append((TensorSlice(offsets=offsets, sizes=shared.sizes), _narrowed(tensor, shared.relative_to(run))))
    return shape, found


def regions_of(
    cuts: Sequence[tuple[Slice, int]], shape: tuple[int, ...], *, owned: bool
) -> Iterator[tuple[TensorSlice, tuple[int, ...]]]:
    """Boxes of the whole tensor, each with its start in the rank's part. Each dim is cut once."""
    of_dims = [[Box(whole=0, own=0, length=size)] for size in shape]
    for part, rank in cuts:
        dim = part.dim % len(shape)
        of_dims[dim] = list(boxes(part, rank, size=shape[dim], owned=owned))
    for corner in itertools.product(*of_dims):
        region = TensorSlice(offsets=tuple(box.whole for box in corner), sizes=tuple(box.length for box in corner))
        yield region, tuple(box.own for box in corner)


def _narrowed(tensor: torch.Tensor, box: TensorSlice) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
