"""Divided tensors in checkpoints: a rank's part as boxes of the whole tensor, so that any layout reads any other's.

Knows a program's plan of shards and the checkpoint's slices; refuses to know files and optimizers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from shardwise.checkpoint.load import Target
from shardwise.checkpoint.save import Shard
from shardwise.checkpoint.slices import TensorSlice
from shardwise.describe.tensor import Slice
from shardwise.execute.program import Program
from shardwise.parallel.tensor.boxes import Box, boxes
from shardwise.parallel.tensor.slices import whole_shape

__all__ = ["num_elements", "shards_of", "targets_of"]


def shards_of(program: Program, parameter: str, name: str, local: torch.Tensor, *, kind: str) -> Iterator[Shard]:
    """What this rank writes under `name` of a tensor that is divided as `parameter` is (a moment of it, say)."""
    cuts = _cuts(program, parameter)
    if not cuts or local.dim() == 0:
        if all(rank == 0 for _, rank in cuts) and program.place.shard == 0:
            yield Shard.whole(name, local, kind=kind)
        return
    shape = _whole(local, cuts)
    for region, own in _regions(cuts, shape, owned=True):
        yield Shard(name=name, kind=kind, global_shape=shape, region=region, tensor=_narrowed(local, region, own))


def targets_of(program: Program, parameter: str, name: str, local: torch.Tensor) -> Iterator[Target]:
    """Where this rank reads `name`, divided as `parameter` is, into `local`."""
    cuts = _cuts(program, parameter)
    shape = tuple(local.shape)
    if not cuts or local.dim() == 0:
        yield Target(name=name, global_shape=shape, region=TensorSlice.whole(shape), out=local)
        return
    shape = _whole(local, cuts)
    for region, own in _regions(cuts, shape, owned=False):
        yield Target(name=name, global_shape=shape, region=region, out=_narrowed(local, region, own))


def num_elements(program: Program, name: str, local: torch.Tensor) -> int:
    """Elements of the whole parameter of which `local` is this rank's part, held or absent."""
    return math.prod(_whole(local, _cuts(program, name)))


def _cuts(program: Program, parameter: str) -> list[tuple[Slice, int]]:
    """How a parameter is divided, and which part is here: inside units among shards, along its experts."""
    place = program.place
    both = [(program.part_of(parameter), place.shard), (program.experts_of(parameter), place.expert)]
    return [(part, rank) for part, rank in both if part is not None]


def _whole(local: torch.Tensor, cuts: Sequence[tuple[Slice, int]]) -> tuple[int, ...]:
    shape = tuple(local.shape)
    for part, rank in cuts:
        shape = whole_shape(shape, part, rank)
    return shape


def _regions(
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


def _narrowed(local: torch.Tensor, region: TensorSlice, own: tuple[int, ...]) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(own, region.sizes, strict=True)):
        local = local.narrow(dim, start, length)
    return local
