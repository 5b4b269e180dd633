"""Words as numbers: those of some texts, in order; 0 fills, 1 stands for words that are not among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FILL", "UNKNOWN", "Words"]

FILL, UNKNOWN = 0, 1


@dataclass(frozen=True, kw_only=True)
class Words:
    """`words[i]` is number i + 2; a text has at most `longest` of them."""

    words: tuple[str, ...]
    longest: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> Words:
        """Those of texts, cut at blanks, in lower case."""
        split = [text.lower().split() for text in texts]
        return cls(
            words=tuple(sorted({word for text in split for word in text})), longest=max(map(len, split), default=0)
        )

    @property
    def num_numbers(self) -> int:
        """Rows of a table with one for every number."""
        return len(self.words) + 2

    def numbers(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(texts, longest); what a longer text has more is cut."""
        known = {word: number for number, word in enumerate(self.words, start=2)}
        rows = np.full((len(texts), self.longest), FILL, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            numbers = [known.get(word, UNKNOWN) for word in text.lower().split()[: self.longest]]
            row[: len(numbers)] = numbers
        return rows
