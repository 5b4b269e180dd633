"""What the queries of one rank see of the keys of another: parts of a mask, and the rectangles a causal one leaves.

    zigzag, 2 ranks, rank 0's queries (chunks 0, 3)        keys 0   3             1   2
                                                        0       ◣   ·             ·   ·      · hidden: not computed
                                                        3       ■   ◣             ■   ■      ■ ◣ one kernel call each

Knows positions and masks as they are given, for the whole sequence; no products, no ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from shardwise.errors import ModelError
from shardwise.parallel.context.placement import Placement

__all__ = ["Block", "Mask", "Runs", "cut_rows", "visible_blocks"]

Runs = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Own rows [start, stop) and the columns [start, stop) that they see of the keys here; where `causal`, row i of the
    block sees its columns 0 to i."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    causal: bool = False


def visible_blocks(queries: Runs, keys: Runs, *, is_causal: bool) -> tuple[Block, ...]:
    """The rectangles that are to be computed, of queries and keys at these positions. A causal mask is torch's: the
    query at position i sees the keys at positions up to i, also where there are more keys than queries."""
    num_queries, num_keys = (sum(stop - start for start, stop in runs) for runs in (queries, keys))
    if not num_queries or not num_keys:
        return ()
    if not is_causal:
        return (Block((0, num_queries), (0, num_keys)),)
    if tuple(queries) == tuple(keys):
        return (Block((0, num_queries), (0, num_keys), causal=True),)
    blocks: list[Block] = []
    row = 0
    for start, stop in queries:
        end = row + stop - start
        seen = sum(max(0, min(last, start) - first) for first, last in keys)  # by all rows of the run
        before = blocks[-1] if blocks else None
        if before is not None and before.rows[1] == row and before.columns == (0, seen) and not before.causal:
            blocks[-1] = Block((before.rows[0], end), (0, seen))
        elif seen:
            blocks.append(Block((row, end), (0, seen)))
        column = 0
        for first, last in keys:
            left, right = max(first, start), min(last, stop)  # positions that are both: a triangle
            if left < right:
                at = column + left - first
                blocks.append(Block((row + left - start, end), (at, at + right - left), causal=True))
            column += last - first
        row = end
    return tuple(blocks)


def cut_rows(block: Block, most: int) -> tuple[Block, ...]:
    """The same rows and columns in blocks of `most` rows at most, for attention whose scores are kept while it runs."""
    (top, bottom), (left, right) = block.rows, block.columns
    if bottom - top <= most:
        return (block,)
    pieces: list[Block] = []
    for start in range(top, bottom, most):
        rows = start, min(start + most, bottom)
        if not block.causal:
            pieces.append(Block(rows, block.columns))
            continue
        middle = min(left + start - top, right)  # what all rows of the piece see; then its own triangle
        if middle > left:
            pieces.append(Block(rows, (left, middle)))
        if middle < right:
            pieces.append(Block(rows, (middle, min(middle + rows[1] - start, right)), causal=True))
    return tuple(pieces)


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """A mask of the whole sequence, as attention takes it: boolean (True: seen) or added to the scores.

    `values` is (1 or samples, 1 or heads, 1 or queries, 1 or keys). Raises ModelError for other shapes.
    """

    values: torch.Tensor
    queries: Placement
    keys: Placement

    def __post_init__(self) -> None:
        rows, columns = self.values.shape[-2:]
        if rows not in (1, self.queries.size) or columns not in (1, self.keys.size):
            raise ModelError(
                f"a mask of attention over divided sequences is given for all {self.queries.size} queries and "
                f"{self.keys.size} keys, or broadcasts along them; this one is {tuple(self.values.shape)}; give it "
                "whole on every rank"
            )

    def part(self, rank: int, source: int, block: Block) -> torch.Tensor:
        """What a block of `rank`'s queries and `source`'s keys sees. A view where possible."""
        values = self.values
        if values.shape[-2] > 1:
            values = _cut(values, -2, self.queries.runs(rank), block.rows)
        if values.shape[-1] > 1:
            values = _cut(values, -1, self.keys.runs(source), block.columns)
        return values

    def swallowed(self, rank: int) -> torch.Tensor | None:
        """The largest value of each of `rank`'s rows where it is so low that scores vanish beside it, 0 elsewhere.

        Rows masked everywhere with the lowest number instead of -inf attend to every key alike, and the sum of their
        exponentials is not representable beside that number. None where there is no such row.
        """
        if not self.values.is_floating_point():
            return None
        values = self.values if self.values.shape[-2] == 1 else self.queries.own(self.values, -2, rank)
        if not values.numel():
            return None
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        largest = values.detach().amax(-1, keepdim=True).to(dtype)
        low = (largest < torch.finfo(dtype).min / 2) & (largest != -math.inf)
        return largest.masked_fill(~low, 0) if bool(low.any()) else None

    def add_gradient(self, total: torch.Tensor, gradient: torch.Tensor, rank: int, source: int, block: Block) -> None:
        """Add what a block's scores (samples, heads, rows, columns) say into `total`, a gradient of `values`."""
        for dim, size in enumerate(total.shape):
            if size == 1 and gradient.shape[dim] > 1:
                gradient = gradient.sum(dim, keepdim=True)
        rows = _positions(total.shape[-2], self.queries.runs(rank), block.rows)
        columns = _positions(total.shape[-1], self.keys.runs(source), block.columns)
        row = 0
        for top, bottom in rows:
            column = 0
            for left, right in columns:
                piece = gradient[..., row : row + bottom - top, column : column + right - left]
                total[..., top:bottom, left:right] += piece
                column += right - left
            row += bottom - top


def _positions(size: int, runs: Runs, part: tuple[int, int]) -> list[tuple[int, int]]:
    """Where elements [start, stop) of runs are in the whole: as runs. Of a dim that broadcasts, its one element."""
    if size == 1:
        return [(0, 1)]
    found: list[tuple[int, int]] = []
    at = 0
    for start, stop in runs:
        first, last = max(part[0] - at, 0), min(part[1] - at, stop - start)
        if first < last:
            found.append((start + first, start + last))
        at += stop - start
    return found


def _cut(values: torch.Tensor, dim: int, runs: Runs, part: tuple[int, int]) -> torch.Tensor:
    pieces = [values.narrow(dim, start, stop - start) for start, stop in _positions(values.shape[dim], runs, part)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
