"""Rows of a table that is divided by rows: every rank looks up its own, and the sum over the ranks is the whole answer.

    ids      4 0 6 2        rank 0 of 2 holds rows 0..2:   0 r0 0 r2   ┐
    own rows …              rank 1      holds rows 3..6:   r4 0 r6 0   ┴─ all-reduce ─►  r4 r0 r6 r2

As Shoeybi et al. 2019 (arXiv:1909.08053, section 3) divide the input embedding. Knows ids and ranges, no modules.
"""

from __future__ import annotations

import torch

from shardwise.describe.tensor import Slice
from shardwise.errors import LayoutError
from shardwise.parallel.tensor.collectives import TensorGroup, reduce_from

__all__ = ["joined", "local_ids", "own_rows", "range_of"]


def range_of(part: Slice, rank: int) -> tuple[int, int]:
    """The one run of indices that `rank` holds. Raises `LayoutError` where it holds several."""
    if len(part.ranges[rank]) != 1:
        raise LayoutError(
            f"a vocabulary is divided into one run of ids for each rank, but rank {rank} holds {part.ranges[rank]}; "
            "give each rank one"
        )
    return part.ranges[rank][0]


def local_ids(ids: torch.Tensor, part: Slice, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids` as row numbers of the rank's part, and which of them stand for rows of other ranks (their number is 0).

    Ids that no rank holds stay outside of the part, so that whoever looks them up fails as on one device.
    """
    start, stop = range_of(part, rank)
    elsewhere = ((ids >= 0) & (ids < start)) | ((ids >= stop) & (ids < part.size))
    return (ids - start).masked_fill(elsewhere, 0), elsewhere


def own_rows(rows: torch.Tensor, elsewhere: torch.Tensor) -> torch.Tensor:
    """This rank's rows, zero where others have them. rows (*ids, width), anything where `elsewhere` (*ids)."""
    return rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)


def joined(rows: torch.Tensor, elsewhere: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """All rows on every rank. rows (*ids, width): what was looked up here, anything where `elsewhere` (*ids)."""
    return reduce_from(own_rows(rows, elsewhere), group)
