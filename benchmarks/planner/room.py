"""How full a device would be: predicted bytes of the fullest rank over its memory, for the choice among layouts.

A caching allocator that has hardly any room gives memory back to the driver and asks for it again, in every
micro-batch: of 16 rows of the H100 sweep that are predicted to fill more than 95 % of their devices 14 took more than
1.6 times as long as predicted. A planner that may choose takes none of these, as long as there are others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.planner.batch import cluster_of
from benchmarks.planner.memory_cases import held_of
from benchmarks.planner.memory_fit import fit_memory, predicted, states_verdict
from benchmarks.planner.rows import Row
from shardwise.plan.compute import FloatArray

__all__ = ["FULLEST", "filled"]

FULLEST = 0.95


def filled(rows: Sequence[Row], known: Sequence[Row], folds: np.ndarray | None = None) -> FloatArray:
    """[row]: the share of a device's memory that it takes, by a fit of `known`; 0 where its source says nothing of
    memory, so that nothing was fitted, or too little else.

    folds: [row], where `known` are the same rows: each is predicted by the fit of the other folds.
    """
    held = [held_of(row, rows) for row in rows]
    found = np.zeros(len(rows))
    if folds is None:
        speaking = [held_of(row, known) for row in known if states_verdict(row)]
        fits = {0: fit_memory([each for each in speaking if each is not None])}
        folds = np.zeros(len(rows), dtype=np.int64)
    else:
        own = [(each, fold) for each, fold in zip(held, folds, strict=True) if each and states_verdict(each.row)]
        fits = {fold: fit_memory([each for each, its in own if its != fold]) for fold in sorted(set(folds.tolist()))}
    for place, (each, fold) in enumerate(zip(held, folds, strict=True)):
        if each is not None and states_verdict(each.row):
            capacity = cluster_of(each.row.gpu, each.row.gpus_per_node or 8).hosts[0].device.memory_bytes
            found[place] = predicted(each, fits[int(fold)](each.row)).max() / capacity
    return found
