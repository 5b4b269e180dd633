"""How far predictions are of a source, or of a GPU, of which no row was fitted: priced by what the others say.

    python -m benchmarks.planner.left_out --table FILE [--json]

A source that is left out is priced by the other sources on its GPU, a GPU by what other GPUs are beside the catalogue.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.planner.fit import Key, Prepared, fit, prepare
from benchmarks.planner.rows import Row, read_rows
from benchmarks.planner.run import cases_of, scored_rows

__all__ = ["left_out", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """`--table FILE [--json]`: a table in the schema of measurements.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner.left_out", description=__doc__)
    parser.add_argument("--table", required=True, help="the rows, of several sources")
    parser.add_argument("--json", action="store_true", help="one JSON line in place of the table")
    given = parser.parse_args(arguments)
    figures = left_out(scored_rows(read_rows(given.table)))
    if given.json:
        print(json.dumps(figures))
        return
    print(f"{'source':36s} {'GPU':24s} {'rows':>5s} {'source left out':>16s} {'GPU left out':>13s}")
    for each in figures:
        print(
            f"{each['file']!s:36.36s} {each['gpu']!s:24.24s} {each['rows']:5d} "
            f"{each['source']:16.1%} {each['device']:13.1%}"
        )


def left_out(rows: Sequence[Row]) -> list[dict[str, object]]:
    """For every source and GPU: its rows, and the median of |predicted / measured - 1| where the source (`source`), and
    where all rows of its GPU (`device`), are left out of the fit."""
    prepared = prepare(cases_of(rows)[0])
    by_source = _errors(prepared, lambda one: one.key[0])
    by_device = _errors(prepared, lambda one: one.cluster.hosts[0].device.name)
    return [
        {
            "file": key[0],
            "gpu": key[1],
            "rows": len(by_source[key]),
            "source": float(np.median(by_source[key])),
            "device": float(np.median(by_device[key])),
        }
        for key in sorted(by_source)
    ]


def _errors(prepared: Sequence[Prepared], of: Callable[[Prepared], str]) -> dict[Key, list[float]]:
    """(file, GPU) -> the error of every row, predicted by a fit of those of which `of` says something else."""
    found: dict[Key, list[float]] = {}
    for name in sorted({of(one) for one in prepared}):
        fitted = fit(prepared, [np.full(len(one.measured), of(one) != name) for one in prepared])
        for one in prepared:
            if of(one) == name:
                seconds = one.batch.step_s(fitted.cluster(one.key, one.cluster))
                found.setdefault(one.key, []).extend(np.abs(seconds / one.measured - 1).tolist())
    return found


if __name__ == "__main__":
    main()
