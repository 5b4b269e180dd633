"""Boxes say where a rank's part lies in the whole tensor."""

from __future__ import annotations

import torch

from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.boxes import Box, boxes
from shardwise.parallel.tensor.slices import cut


def written(part: Slice, whole: torch.Tensor, *, owned: bool) -> torch.Tensor:
    """What the boxes of all ranks put into an empty tensor, each element as often as it is written."""
    out = torch.zeros_like(whole)
    for rank in range(part.num_ranks):
        local = cut(whole, part, rank)
        for box in boxes(part, rank, size=whole.shape[part.dim], owned=owned):
            out.narrow(part.dim, box.whole, box.length).add_(local.narrow(part.dim, box.own, box.length))
    return out


def test_one_run_where_parts_lie_together() -> None:
    part = Slice.even(0, 8, 2)
    assert boxes(part, 1, size=8, owned=False) == (Box(whole=4, own=0, length=4),)


def test_packed_parts_and_multiples_have_a_run_each() -> None:
    packed = Slice.even(1, 12, 2, parts=(4, 4, 4))
    whole = torch.arange(36.0).view(3, 12) + 1
    assert len(boxes(packed, 0, size=12, owned=True)) == 3
    assert torch.equal(written(packed, whole, owned=True), whole)
    repeated = torch.arange(48.0).view(2, 24) + 1
    assert torch.equal(written(packed, repeated, owned=True), repeated)


def test_what_two_ranks_hold_is_owned_by_one() -> None:
    keys = Slice(dim=0, size=4, ranges=(((0, 2),), ((0, 2),), ((2, 4),), ((2, 4),)))
    whole = torch.arange(8.0).view(4, 2) + 1
    assert torch.equal(written(keys, whole, owned=True), whole)
    assert torch.equal(written(keys, whole, owned=False), 2 * whole)
    assert boxes(keys, 1, size=4, owned=True) == ()
