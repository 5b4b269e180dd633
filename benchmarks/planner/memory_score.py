"""How far predicted bytes are from measured ones, and how often "does it fit" is decided right, by fits that did not
see the row.

    python -m benchmarks.planner.memory_score --fit FILE --score FILE     the same file twice: cross-validation

See `memory_fit` for what is predicted and fitted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.planner.memory_cases import Held, held_of
from benchmarks.planner.memory_fit import (
    COEFFICIENTS,
    GIB,
    MemoryFit,
    fit_memory,
    fits,
    groups_of,
    measured_place,
    states_bytes,
    states_verdict,
)
from benchmarks.planner.rows import Row, read_rows

__all__ = ["memory_figures", "memory_table", "with_memory"]

_FOLDS = 5


def memory_figures(rows: Sequence[Row], fit_rows: Sequence[Row], *, folds: int = _FOLDS) -> dict[str, Any]:
    """The figures of `rows` by fits of `fit_rows`: by folds where both are the same, so that no row is seen.

    by_source: file -> memory_median, memory_rows (tier A) and memory_median_all, memory_rows_all (all tiers), errors as
    fractions; oom_accuracy over oom_rows rows that say whether they ran in memory; oom_wrong_runs, oom_wrong_ooms;
    unpriced_memory: rows that say something and state too little to be predicted. A row of both tables, whatever their
    files are called, is predicted by folds.
    """
    held = _held(rows)
    known = _held(fit_rows)
    crossed = {}
    if set(rows) & set(fit_rows):
        crossed = dict(zip((each.row for each in known), _cross_fits(known, folds), strict=True))
    fit_of = None if len(crossed) and all(each.row in crossed for each in held) else fit_memory(known)
    chosen = [crossed[each.row] if fit_of is None else crossed.get(each.row) or fit_of(each.row) for each in held]
    errors = [
        (each.row, abs(measured_place(each, fit) / GIB / (each.row.memory_gib or 1.0) - 1.0))
        for each, fit in zip(held, chosen, strict=True)
        if states_bytes(each.row)
    ]
    by_source: dict[str, dict[str, float]] = {}
    for file in sorted({row.file for row, _ in errors}):
        every = [error for row, error in errors if row.file == file]
        tier_a = [error for row, error in errors if row.file == file and row.tier == "A"]
        by_source[file] = {
            "memory_median": float(np.median(tier_a or every)),
            "memory_mean": float(np.mean(tier_a or every)),
            "memory_rows": len(tier_a or every),
            "memory_median_all": float(np.median(every)),
            "memory_rows_all": len(every),
        }
    verdicts = [
        (each.row.status == "ok", fits(each, fit))
        for each, fit in zip(held, chosen, strict=True)
        if states_verdict(each.row)
    ]
    return {
        "by_source": by_source,
        "memory_median": float(np.median([error for _, error in errors])) if errors else float("nan"),
        "oom_accuracy": float(np.mean([ran == said for ran, said in verdicts])) if verdicts else float("nan"),
        "oom_rows": len(verdicts),
        "oom_wrong_runs": sum(ran and not said for ran, said in verdicts),
        "oom_wrong_ooms": sum(said and not ran for ran, said in verdicts),
        "unpriced_memory": sum(states_verdict(row) for row in rows) - len(held),
    }


def with_memory(figures: Mapping[str, Any], rows: Sequence[Row], fit_rows: Sequence[Row]) -> dict[str, Any]:
    """`figures` with those of memory: in `by_source` of every file, and of all rows."""
    found = memory_figures(rows, fit_rows)
    by_source = {file: dict(own) for file, own in figures.get("by_source", {}).items()}
    for file, own in found.pop("by_source").items():
        by_source.setdefault(file, {"rows": 0}).update(own)
    return {**figures, "by_source": by_source, **found}


def memory_table(rows: Sequence[Row]) -> str:
    """Every coefficient of every source and GPU; raises AssertionError where one is not physical."""
    held = _held(rows)
    fit_of = fit_memory(held)
    lines = [f"{'source, GPU':60s} " + " ".join(f"{each.name[:10]:>10s}" for each in COEFFICIENTS) + "     usable"]
    for (file, gpu), group in groups_of(held).items():
        fit = fit_of(group[0].row)
        for each in COEFFICIENTS:
            assert each.least <= fit.values[each.name] <= each.most, f"{file}, {gpu}: {each.name} is not physical"
        values = [*fit.values.values(), fit.usable]
        lines.append(f"{f'{file}, {gpu}'[:60]:60s} " + " ".join(f"{value:10.4g}" for value in values))
    return "\n".join(lines)


def _held(rows: Sequence[Row]) -> list[Held]:
    speaking = [row for row in rows if states_verdict(row)]
    found = [held_of(row, rows) for row in speaking]
    return [each for each in found if each is not None]


def _cross_fits(held: Sequence[Held], folds: int) -> list[MemoryFit]:
    """For every row the fit of the folds that it is not in. Configurations are dealt out by chance, always the same;
    rows of one, which differ in their batch alone, are in one fold."""
    names = [str(_configuration(each.row)) for each in held]
    distinct = sorted(set(names))
    drawn = dict(zip(distinct, np.random.default_rng(0).permutation(len(distinct)) % folds, strict=True))
    fold = [drawn[name] for name in names]
    fits_of = [fit_memory([each for each, its in zip(held, fold, strict=True) if its != k]) for k in range(folds)]
    return [fits_of[its](each.row) for each, its in zip(held, fold, strict=True)]


def _configuration(row: Row) -> tuple[object, ...]:
    devices = (row.file, row.model, row.gpu, row.n_gpus, row.tp, row.pp, row.vpp, row.dp, row.cp, row.zero)
    return (*devices, row.micro_batch, row.seq_len, row.recompute, row.schedule)


def main() -> None:
    """Prints the coefficients, and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner.memory_score", description=__doc__)
    parser.add_argument("--fit", required=True, help="a table in the schema of measurements.csv")
    parser.add_argument("--score", required=True, help="another, or the same")
    arguments = parser.parse_args()
    fit_rows, rows = read_rows(arguments.fit), read_rows(arguments.score)
    print(memory_table(fit_rows))
    print(json.dumps(memory_figures(rows, fit_rows)))


if __name__ == "__main__":
    main()
