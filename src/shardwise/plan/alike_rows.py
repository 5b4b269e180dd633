"""Which rows of a table are alike: columns of whole numbers, hundreds of thousands of rows, in a few passes over them.

    3 0        0
    7 1   ->   1        numbers of kinds, in the order of their values; and the first row of each kind
    3 0        0

Numbers are counted, not sorted. Refuses to know what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["alike_rows"]

IntArray = npt.NDArray[np.int64]

_MOST = 1 << 22  # numbers that are counted in one pass


def alike_rows(columns: Sequence[npt.NDArray[np.integer]]) -> tuple[IntArray, IntArray]:
    """(first, kind): first[k] is the first row of kind k, kind[row] its kind. Kinds stand in the order of their numbers
    in the first column, then in the next. Numbers are 0 or more."""
    code, size = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        own, count = _dense(column.astype(np.int64))
        if size * count > _MOST:
            code, size = _dense(code)
        code, size = code * count + own, size * count
    kind, count = _dense(code)
    first = np.zeros(count, dtype=np.int64)
    first[kind[::-1]] = np.arange(len(kind) - 1, -1, -1)
    return first, kind


def _dense(numbers: IntArray) -> tuple[IntArray, int]:
    """The place of each number among those that there are, and how many these are."""
    most = int(numbers.max()) + 1 if len(numbers) else 0
    if most > 8 * _MOST:
        found, place = np.unique(numbers, return_inverse=True)
        return place.reshape(-1).astype(np.int64), len(found)
    there = np.zeros(most, dtype=np.bool_)
    there[numbers] = True
    places = np.cumsum(there) - 1
    return np.asarray(places[numbers]), int(there.sum())
