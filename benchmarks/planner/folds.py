"""Folds by configuration: rows that differ in what was measured alone are in one, always the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.planner.rows import Row

__all__ = ["FOLDS", "folds_of"]

FOLDS = 5
_SEED = 6


def folds_of(rows: Sequence[Row]) -> np.ndarray:
    """[row]: its fold; drawn by configuration."""
    names = [
        str(
            (
                r.file,
                r.model,
                r.gpu,
                r.n_gpus,
                r.tp,
                r.pp,
                r.vpp,
                r.dp,
                r.cp,
                r.ep,
                r.micro_batch,
                r.seq_len,
                r.global_batch_seqs,
                r.recompute,
            )
        )
        for r in rows
    ]
    distinct = sorted(set(names))
    drawn = np.random.default_rng(_SEED).permutation(len(distinct)) % FOLDS
    fold = dict(zip(distinct, drawn.tolist(), strict=True))
    return np.array([fold[name] for name in names])
