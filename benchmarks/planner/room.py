"""How full a device would be: predicted bytes of the fullest rank over its memory, for the choice among layouts.

What is too full to be chosen is the library's rule (`shardwise.plan.room`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.planner.folds import folds_of
from benchmarks.planner.memory_cases import Held, held_of
from benchmarks.planner.memory_fit import MemoryFit, capacity_of, fit_memory, predicted, states_verdict
from benchmarks.planner.rows import Row
from shardwise.plan.compute import FloatArray

__all__ = ["filled"]


def filled(rows: Sequence[Row], known: Sequence[Row]) -> FloatArray:
    """[row]: the share of a device's memory that it takes, by a fit of known rows among which it is not; 0 where its
    source says nothing of memory, so that nothing was fitted, or too little else.

    Rows that are among the known ones are predicted by the fit of the folds that they are not in.
    """
    own: list[tuple[Held, int]] = []
    for row, fold in zip(known, folds_of(known).tolist(), strict=True):
        held = held_of(row, known) if states_verdict(row) else None
        if held is not None:
            own.append((held, fold))
    fold_of = dict(zip(known, folds_of(known).tolist(), strict=True))
    needed: dict[int, Callable[[Row], MemoryFit]] = {}
    found = np.zeros(len(rows))
    for place, row in enumerate(rows):
        held = held_of(row, rows) if states_verdict(row) else None
        if held is None:
            continue
        without = fold_of.get(row, -1)
        if without not in needed:
            needed[without] = fit_memory([each for each, fold in own if fold != without])
        found[place] = predicted(held, needed[without](row)).max() / capacity_of(row)
    return found
