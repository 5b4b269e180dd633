"""Gradients that several ranks hold: each rank's own is held against one device by a few numbers, not sent.

    marks of g    <s_1, g>, ..., <s_8, g>         s_k: random signs, the same for all tensors of one size
    E (<s_k, a> - <s_k, b>)^2 = |a - b|^2         so the marks of two tensors tell how far they are apart

The sketch of Alon, Matias and Szegedy (1996, section 2.2); eight marks tell the distance to a quarter or so. Knows a
program on one rank, and a reference's gradients; starts nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch

from shardwise.describe.tensor import Slice
from shardwise.execute.program import Program
from shardwise.parallel.tensor.slices import cut

__all__ = ["Copy", "copies_of", "distances_of", "marks_of"]

_NUM = 8
_PIECE = 2**16  # elements whose signs are held at once

Marks = tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """The marks of one rank's gradient of a parameter (None: it has none), and what of the whole that is."""

    marks: Marks | None
    cuts: tuple[tuple[Slice, int], ...] = ()  # slices, each with the part that is here


def copies_of(program: Program) -> dict[str, Copy]:
    """What this rank holds, by name, and does not answer whole: another rank owns it, or elements of it. Collective."""
    place = program.place
    found: dict[str, Copy] = {}
    for name, gradient in program.gradients():
        both = [(program.experts_of(name), place.expert), (program.part_of(name), place.shard)]
        cuts = tuple((part, rank) for part, rank in both if part is not None and part.num_ranks > 1)
        if not program.owns(name) or any(part.shared for part, _ in cuts):
            found[name] = Copy(marks=marks_of(gradient), cuts=cuts)
    return found


def distances_of(ranks: Iterable[Mapping[str, Copy]], gradients: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """How far the farthest copy of each parameter's gradient is from the reference's whole ones, about.

    Tensors are asked for one at a time, so that they may lie in files.
    """
    by_name: dict[str, set[Copy]] = {}
    for copies in ranks:
        for name, copy in copies.items():
            by_name.setdefault(name, set()).add(copy)
    found: dict[str, float] = {}
    for name, held in by_name.items():
        whole = gradients.get(name)
        wanted: dict[tuple[tuple[Slice, int], ...], Marks | None] = {}
        for copy in held:
            if copy.cuts not in wanted:
                wanted[copy.cuts] = marks_of(_part(whole, copy.cuts))
            distance = _distance(copy.marks, wanted[copy.cuts])
            found[name] = max(found.get(name, 0.0), distance)
    return found


def marks_of(gradient: torch.Tensor | None) -> Marks | None:
    """The marks of a tensor of any shape; its elements are counted in their order."""
    if gradient is None:
        return None
    flat = gradient.detach().reshape(-1)
    generator = torch.Generator().manual_seed(flat.numel())
    marks = torch.zeros(_NUM, dtype=torch.float64)
    bits = torch.arange(_NUM, dtype=torch.uint8).unsqueeze(1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].to("cpu", torch.float64)
        drawn = torch.randint(0, 2**_NUM, piece.shape, generator=generator, dtype=torch.uint8)
        ones = ((drawn >> bits) & 1).double()  # (marks, elements)
        marks += 2.0 * (ones @ piece) - piece.sum()
    return tuple(marks.tolist())


def _part(whole: torch.Tensor | None, cuts: tuple[tuple[Slice, int], ...]) -> torch.Tensor | None:
    for part, rank in cuts:
        whole = None if whole is None else cut(whole, part, rank)
    return whole


def _distance(a: Marks | None, b: Marks | None) -> float:
    """A gradient that is missing is one of zeros. Infinite where one is no number."""
    nothing = (0.0,) * _NUM
    squares = sum((x - y) ** 2 for x, y in zip(a or nothing, b or nothing, strict=True))
    return math.sqrt(squares / _NUM) if math.isfinite(squares) else math.inf
