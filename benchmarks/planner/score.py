"""How far predicted steps are from measured ones, and how good the first choice is. Arithmetic on arrays and rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from benchmarks.planner.rows import Row
from shardwise.plan.compute import FloatArray
from shardwise.plan.room import choosable

__all__ = ["choice_figures", "source_figures"]


def source_figures(rows: Sequence[Row], predicted: FloatArray) -> dict[str, dict[str, float]]:
    """By file: rows, and the median and mean of |predicted / measured - 1|; rows without a price are left out."""
    errors: dict[str, list[float]] = {}
    for row, seconds in zip(rows, predicted, strict=True):
        if row.step_time_s and np.isfinite(seconds):
            errors.setdefault(row.file, []).append(abs(seconds / row.step_time_s - 1))
    return {
        file: {"rows": len(found), "time_median": float(np.median(found)), "time_mean": float(np.mean(found))}
        for file, found in sorted(errors.items())
    }


def choice_figures(rows: Sequence[Row], predicted: FloatArray, shares: FloatArray) -> dict[str, float]:
    """Among rows of one source, model, GPU count, batch and sequence (three layouts or more): how often the one that is
    ranked first was measured within 5 % and 10 % of the fastest, and the median rank correlation.

    Ranked first is the fastest by prediction among those that may be chosen: that leave room (`plan.room`; `shares`: of
    memory that they take), if there are any.
    """
    groups: dict[tuple[object, ...], list[tuple[float, float, float]]] = {}
    for row, seconds, share in zip(rows, predicted, shares, strict=True):
        if row.step_time_s and np.isfinite(seconds):
            groups.setdefault(_group(row), []).append((float(seconds), row.step_time_s, float(share)))
    kept = [np.array(found) for found in groups.values() if len(found) >= 3]
    if not kept:
        return {"top1_within_5pct": 0.0, "top1_within_10pct": 0.0, "spearman_median": 0.0, "groups": 0}
    lost = np.array([_first(found)[1] / found[:, 1].min() - 1 for found in kept])
    ranks = [float(spearmanr(found[:, 0], found[:, 1]).statistic) for found in kept if len(set(found[:, 1])) > 1]
    return {
        "top1_within_5pct": float(np.mean(lost <= 0.05)),
        "top1_within_10pct": float(np.mean(lost <= 0.10)),
        "spearman_median": float(np.nanmedian(ranks)) if ranks else 0.0,
        "groups": len(kept),
    }


def _first(found: FloatArray) -> FloatArray:
    """The row (predicted, measured, share) that is ranked first."""
    among = found[choosable(1.0 - found[:, 2])]
    return np.asarray(among[np.argmin(among[:, 0])])


def _group(row: Row) -> tuple[object, ...]:
    return (row.file, row.model, row.gpu, row.n_gpus, row.global_batch_seqs, row.seq_len)
