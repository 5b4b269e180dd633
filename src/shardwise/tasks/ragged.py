"""Rows of different length in one array, in two files that are mapped into memory. Knows numbers; no meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Ragged"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Row i is values[starts[i] : starts[i + 1]]."""

    values: NDArray[Any]
    starts: NDArray[np.int64]  # (rows + 1,)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], *, dtype: DTypeLike) -> Ragged:
        """These rows, copied."""
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        flat = [np.asarray(row, dtype=dtype) for row in rows]
        return cls(values=np.concatenate([np.empty(0, dtype=dtype), *flat]), starts=starts)

    @classmethod
    def open(cls, folder: Path, name: str) -> Ragged:
        """Rows that were saved. Raises OSError and ValueError for files that are missing or damaged."""
        values = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return cls(values=values, starts=np.load(folder / f"{name}-starts.npy", allow_pickle=False))

    def save(self, folder: Path, name: str) -> None:
        """Write both files."""
        np.save(folder / f"{name}.npy", self.values)
        np.save(folder / f"{name}-starts.npy", self.starts)

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of every row."""
        return tuple(np.diff(self.starts).tolist())

    def row(self, number: int) -> NDArray[Any]:
        """One row."""
        found: NDArray[Any] = self.values[self.starts[number] : self.starts[number + 1]]
        return found
