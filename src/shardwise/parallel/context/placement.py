"""Which tokens of a sequence are on which of the ranks that divide it. Knows numbers and slices, no attention.

    contiguous, 3 ranks   0 0 0 0 1 1 1 1 2 2 2 2
    zigzag, 3 ranks       0 0 1 1 2 2 2 2 1 1 0 0

A token that sees all before it has work that grows with its position: in zigzag order, an early and a late chunk on
every rank, every rank has the same (Dubey et al. 2024, arXiv:2407.21783, section 3.3.2; Megatron Core deals alike).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from shardwise.errors import LayoutError

__all__ = ["Placement"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A sequence of `size` tokens on `contexts` ranks; on one, every rank that asks has it whole.

    Chunks differ by one token at most, so sizes that `contexts` does not divide are dealt out too; of a sequence
    shorter than the chunks are many, some ranks have fewer chunks, or none. Raises LayoutError for numbers below 1.
    """

    size: int
    contexts: int
    zigzag: bool = False

    def __post_init__(self) -> None:
        if self.size < 0 or self.contexts < 1:
            raise LayoutError(
                f"a sequence of n >= 0 tokens is divided among 1 or more ranks; got {self.size} tokens and "
                f"{self.contexts} ranks"
            )

    def runs(self, context: int) -> tuple[tuple[int, int], ...]:
        """[start, stop) of what one rank has, ascending, none of them empty, neighbours joined."""
        if not 0 <= context < self.contexts:
            raise LayoutError(
                f"a sequence that is divided among {self.contexts} ranks has parts 0 to {self.contexts - 1}; "
                f"there is no part {context}"
            )
        if not self.zigzag:
            runs = [self._chunk(context, self.contexts)]
        else:
            chunks = 2 * self.contexts
            runs = [self._chunk(context, chunks), self._chunk(chunks - 1 - context, chunks)]
            if runs[0][1] == runs[1][0]:
                runs = [(runs[0][0], runs[1][1])]
        return tuple((start, stop) for start, stop in runs if start < stop)

    def num(self, context: int) -> int:
        """How many tokens one rank has."""
        return sum(stop - start for start, stop in self.runs(context))

    def positions(self, context: int, device: torch.device | None = None) -> torch.Tensor:
        """Where in the whole sequence the tokens of one rank are: (own tokens,) of int64, ascending."""
        runs = [torch.arange(start, stop, device=device) for start, stop in self.runs(context)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)

    def own(self, whole: torch.Tensor, dim: int, context: int) -> torch.Tensor:
        """What one rank has of a whole tensor: a view where that is one run, else a copy. Differentiable."""
        runs = self.runs(context)
        if not runs:
            return whole.narrow(dim, 0, 0)
        parts = [whole.narrow(dim, start, stop - start) for start, stop in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The whole tensor, from what the ranks have of it, in their order. Differentiable."""
        if self.contexts == 1:
            return parts[0]
        pieces: list[tuple[int, torch.Tensor]] = []
        for context, part in enumerate(parts):
            at = 0
            for start, stop in self.runs(context):
                pieces.append((start, part.narrow(dim, at, stop - start)))
                at += stop - start
        ordered = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
        return torch.cat(ordered, dim) if ordered else parts[0]

    def _chunk(self, index: int, chunks: int) -> tuple[int, int]:
        return index * self.size // chunks, (index + 1) * self.size // chunks
