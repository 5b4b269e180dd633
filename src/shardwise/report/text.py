"""A report as text: one table a section, at most 100 columns, what was not measured says so. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shardwise.plan.compare_run import ACTIONS, MEMORY, STEP, TRAFFIC, TRANSFERS, WAITING, Row, median_error
from shardwise.plan.run_estimate import RunEstimate
from shardwise.plan.run_measured import RunMeasured
from shardwise.quantities import format_bytes, format_seconds

__all__ = ["plain_report", "report_text"]

_TITLES = {
    STEP: "a step",
    MEMORY: "memory at its peak",
    ACTIONS: "an action on a stage",
    WAITING: "waiting in a step",
    TRANSFERS: "one message between stages",
    TRAFFIC: "sent in a step by each rank",
}
_LABEL, _COLUMN = 32, 15


def report_text(estimate: RunEstimate, measured: RunMeasured, rows: Sequence[Row]) -> str:
    """All of it."""
    return "\n".join([*_head(estimate, measured), *_tables(rows), "", *_summary(rows)])


def plain_report(estimate: RunEstimate, measured: RunMeasured, rows: Sequence[Row]) -> dict[str, Any]:
    """The same for programs: JSON values, None where there is nothing."""
    return {
        "layout": str(estimate.laid_out),
        "cluster": estimate.source,
        "steps": measured.steps,
        "recorded": measured.recorded,
        "spread": measured.spread,
        "rows": [
            {
                "section": row.section,
                "what": row.what.strip(),
                "unit": row.unit,
                "predicted": row.predicted,
                "measured": row.measured,
                "error": row.error,
            }
            for row in rows
        ],
        "median_error": {section: median_error(rows, section) for section in _TITLES},
    }


def _head(estimate: RunEstimate, measured: RunMeasured) -> Iterator[str]:
    yield f"layout        {estimate.laid_out}, {estimate.num_micro_batches} micro-batches a replica"
    yield f"predicted     for {estimate.source}"
    for note in estimate.notes:
        yield f"              {note}"
    if not measured.steps:
        yield "measured      nothing yet: the first two steps of a run are left out"
        return
    recorded = f"{measured.recorded} of them recorded" if measured.recorded else "none of them recorded"
    yield f"measured      medians of {measured.steps} steps behind the first two, {recorded}"
    if measured.spread:
        yield f"              half of these steps lie within ±{measured.spread:.1%} of their median"


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    for section, title in _TITLES.items():
        own = [row for row in rows if row.section == section]
        if own:
            yield ""
            yield f"{title:{_LABEL}}{'predicted':>{_COLUMN}}{'measured':>{_COLUMN}}{'error':>{_COLUMN}}"
            yield from (_line(row) for row in own)


def _line(row: Row) -> str:
    cells = (_number(row.predicted, row.unit, "-"), _number(row.measured, row.unit, "not measured"), _percent(row))
    return f"{'  ' + row.what:{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells).rstrip()


def _number(value: float | None, unit: str, missing: str) -> str:
    if value is None:
        return missing
    if unit == "s":
        return format_seconds(value)
    return format_bytes(value)


def _percent(row: Row) -> str:
    return "" if row.error is None else f"{row.error:+.1%}"


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    told = [(section, median_error(rows, section)) for section in _TITLES]
    known = [f"{section} {error:.1%}" for section, error in told if error is not None]
    yield f"median errors: {', '.join(known)}" if known else "median errors: nothing to compare yet"
