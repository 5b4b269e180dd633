"""Fits coefficients on one table, scores them on another, or on the same by cross-validation. Prints one JSON line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np

from benchmarks.planner.cases import Case, case_of
from benchmarks.planner.coefficients import COEFFICIENTS
from benchmarks.planner.fit import Fitted, Prepared, fit, prepare
from benchmarks.planner.folds import FOLDS, folds_of
from benchmarks.planner.memory_score import memory_table, with_memory
from benchmarks.planner.room import filled
from benchmarks.planner.rows import Row, read_rows
from benchmarks.planner.score import choice_figures, source_figures
from shardwise.plan.compute import FloatArray

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """`--fit FILE --score FILE [--json-only]`: both in the schema of measurements.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--fit", required=True, help="the table whose rows are fitted")
    parser.add_argument("--score", required=True, help="the table whose rows are scored; the same: cross-validation")
    parser.add_argument("--json-only", action="store_true", help="only the JSON line")
    given = parser.parse_args(arguments)
    every, known = read_rows(given.score), read_rows(given.fit)
    rows = scored_rows(every)
    predicted, fitted = unseen(rows, scored_rows(known))
    shares = filled(rows, known)
    figures = {"by_source": source_figures(rows, predicted), **choice_figures(rows, predicted, shares)}
    figures["unpriced"] = int((~np.isfinite(predicted)).sum())
    figures = with_memory(figures, every, known)
    if not given.json_only:
        print(coefficient_table(fitted))
        print(memory_table(known))
    print(json.dumps(figures))


def scored_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Tier A that ran."""
    return tuple(row for row in rows if row.tier == "A" and row.status == "ok" and (row.step_time_s or 0.0) > 0)


def unseen(rows: Sequence[Row], known: Sequence[Row]) -> tuple[FloatArray, Fitted]:
    """[row]: its step by a fit of known rows among which it is not, and the fit of all that are known. What both tables
    have, whatever their files are called, is predicted by cross-validation of the known ones."""
    own: dict[Row, float] = {}
    if set(rows) & set(known):
        found, fitted = cross_validated(known)
        own = dict(zip(known, found.tolist(), strict=True))
    else:
        fitted = fitted_on(known)
    predicted = np.array([own.get(row, np.nan) for row in rows])
    others = np.array([place for place, row in enumerate(rows) if row not in own], dtype=np.int64)
    if len(others):
        predicted[others] = predicted_by(fitted, rows)[others]
    return predicted, fitted


def cross_validated(rows: Sequence[Row]) -> tuple[FloatArray, Fitted]:
    """[row]: its step by a fit of the other folds; and the fit of all. Equal configurations are in one fold."""
    cases, places = cases_of(rows)
    prepared = prepare(cases)
    indices = _indices(prepared, cases)
    folds = folds_of([rows[place] for place in places])
    found = np.full(len(rows), np.nan)
    for fold in range(FOLDS):
        chosen = [folds[own] != fold for own in indices]
        fitted = fit(prepared, chosen)
        for one, own, rows_of in zip(prepared, indices, chosen, strict=True):
            seconds = one.batch.step_s(fitted.cluster(one.key, one.cluster))
            found[places[own[~rows_of]]] = seconds[~rows_of]
    return found, fit(prepared, [np.ones(len(own), dtype=bool) for own in indices])


def fitted_on(rows: Sequence[Row]) -> Fitted:
    """The fit of all of these rows."""
    cases, _ = cases_of(rows)
    prepared = prepare(cases)
    return fit(prepared, [np.ones(len(one.measured), dtype=bool) for one in prepared])


def predicted_by(fitted: Fitted, rows: Sequence[Row]) -> FloatArray:
    """[row]: its step by this fit; not a number where the row states too little."""
    cases, places = cases_of(rows)
    prepared = prepare(cases)
    found = np.full(len(rows), np.nan)
    for one, own in zip(prepared, _indices(prepared, cases), strict=True):
        found[places[own]] = one.batch.step_s(fitted.cluster(one.key, one.cluster))
    return found


def cases_of(rows: Sequence[Row]) -> tuple[list[Case], np.ndarray]:
    """Cases, and the place of each one's row."""
    made = [(place, case_of(row, rows)) for place, row in enumerate(rows)]
    kept = [(place, case) for place, case in made if case is not None]
    return [case for _, case in kept], np.array([place for place, _ in kept], dtype=np.int64)


def coefficient_table(fitted: Fitted) -> str:
    """Every coefficient of every source and GPU; raises AssertionError where one is not physical."""
    names = [str(each) for each in COEFFICIENTS]
    lines = [f"{'source, GPU':60s} " + " ".join(f"{name.split('.')[-1][:10]:>10s}" for name in names)]
    entries = {
        **{f"all, {gpu}": logs for gpu, logs in fitted.of_gpus.items()},
        **{f"{file}, {gpu}": logs for (file, gpu), logs in fitted.of_sources.items()},
    }
    for name, logs in entries.items():
        values = np.exp(logs)
        for each, value in zip(COEFFICIENTS, values, strict=True):
            assert 0 < value <= each.most * (1 + 1e-9), f"{name}: {each} = {value} is not physical"
        lines.append(f"{name[:60]:60s} " + " ".join(f"{value:10.4g}" for value in values))
    return "\n".join(lines)


def _indices(prepared: Sequence[Prepared], cases: Sequence[Case]) -> list[np.ndarray]:
    """[source]: where its cases stand among all."""
    place = {id(case): index for index, case in enumerate(cases)}
    return [np.array([place[id(case)] for case in one.batch.cases], dtype=np.int64) for one in prepared]
