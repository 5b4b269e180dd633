"""Divided tensors in checkpoints: a rank's part as boxes of the whole tensor, so that any layout reads any other's.

Knows a program's plan of shards and the checkpoint's slices; refuses to know files and optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from shardwise.checkpoint.load import Target
from shardwise.checkpoint.save import Shard
from shardwise.checkpoint.slices import TensorSlice
from shardwise.describe.tensor import Slice
from shardwise.execute.program import Program
from shardwise.parallel.tensor.boxes import boxes
from shardwise.parallel.tensor.slices import whole_shape

__all__ = ["num_elements", "shards_of", "targets_of"]


def shards_of(program: Program, parameter: str, name: str, local: torch.Tensor, *, kind: str) -> Iterator[Shard]:
    """What this rank writes under `name` of a tensor that is divided as `parameter` is (a moment of it, say)."""
    part = program.part_of(parameter)
    if part is None or local.dim() == 0:
        if program.place.shard == 0:
            yield Shard.whole(name, local, kind=kind)
        return
    shape = whole_shape(local.shape, part, program.place.shard)
    for region, own in _regions(part, program.place.shard, shape, owned=True):
        tensor = local.narrow(part.dim, own, region.sizes[part.dim % len(shape)])
        yield Shard(name=name, kind=kind, global_shape=shape, region=region, tensor=tensor)


def targets_of(program: Program, parameter: str, name: str, local: torch.Tensor) -> Iterator[Target]:
    """Where this rank reads `name`, divided as `parameter` is, into `local`."""
    part = program.part_of(parameter)
    shape = tuple(local.shape)
    if part is None or local.dim() == 0:
        yield Target(name=name, global_shape=shape, region=TensorSlice.whole(shape), out=local)
        return
    shape = whole_shape(local.shape, part, program.place.shard)
    for region, own in _regions(part, program.place.shard, shape, owned=False):
        out = local.narrow(part.dim, own, region.sizes[part.dim % len(shape)])
        yield Target(name=name, global_shape=shape, region=region, out=out)


def num_elements(program: Program, name: str, local: torch.Tensor) -> int:
    """Elements of the whole parameter of which `local` is this rank's part, held or absent."""
    part = program.part_of(name)
    if part is None:
        return local.numel()
    return math.prod(whole_shape(local.shape, part, program.place.shard))


def _regions(part: Slice, shard: int, shape: tuple[int, ...], *, owned: bool) -> Iterator[tuple[TensorSlice, int]]:
    """Boxes of the whole tensor, each with its start in the rank's part."""
    dim = part.dim % len(shape)
    for box in boxes(part, shard, size=shape[dim], owned=owned):
        offsets = tuple(box.whole if each == dim else 0 for each in range(len(shape)))
        sizes = tuple(box.length if each == dim else size for each, size in enumerate(shape))
        yield TensorSlice(offsets=offsets, sizes=sizes), box.own
