"""`shardwise plan --calibrate`: fits a cluster to what a run measured, says how much better it predicts, writes it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from shardwise.describe.catalogue import load_cluster
from shardwise.describe.cluster_file import cluster_text
from shardwise.errors import ConfigError
from shardwise.plan.calibrate import Calibrated, Fitted, calibrate
from shardwise.plan.compare_run import ACTIONS, MEMORY, STEP, TRANSFERS, WAITING, Row, median_error
from shardwise.plan.resize import of_devices
from shardwise.plan.run_estimate import RunEstimate, read_estimate
from shardwise.quantities import format_bytes, format_seconds
from shardwise.report.read_run import read_run

__all__ = ["calibrate_run"]

_SECTIONS = {
    STEP: "a step and its parts",
    MEMORY: "memory of a rank",
    ACTIONS: "an action on a stage",
    WAITING: "waiting in a step",
    TRANSFERS: "a message between stages",
}


def calibrate_run(folder: str, *, cluster: str | None, out: Path | None) -> str:
    """The cluster of a run's folder, fitted; `cluster` is a name or a file to begin with instead of the run's own.

    Written to `out`. Returns what was fitted, as text. Raises `ConfigError`.
    """
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{out} is to be written into a folder that is not there; make {out.parent}")
    estimate, measured = read_estimate(folder), read_run(folder)
    ranks = estimate.laid_out.world_size
    start = None if cluster is None else of_devices(load_cluster(cluster, ranks=ranks), ranks)
    made = calibrate(estimate, measured, start)
    lines = [*_head(estimate, cluster, measured.steps), "", *_coefficients(made), "", *_errors(made)]
    if out is None:
        return "\n".join([*lines, "", "written nowhere; --out FILE.toml keeps it"])
    comment = f"Fitted by shardwise plan --calibrate to {measured.steps} steps of {estimate.laid_out} on {_today()}."
    out.write_text(cluster_text(made.cluster, comment=comment), encoding="utf-8")
    return "\n".join([*lines, "", f"written to {out}"])


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def _head(estimate: RunEstimate, cluster: str | None, steps: int) -> Iterator[str]:
    yield f"layout        {estimate.laid_out}, {steps} steps behind the first two"
    yield f"given         {estimate.source if cluster is None else f'the cluster {cluster}'}"


def _coefficients(made: Calibrated) -> Iterator[str]:
    yield f"{'coefficient':28}{'given':>14}{'fitted':>14}"
    for each in made.coefficients:
        note = "" if each.seen else "  nothing in this run depends on it"
        note = "  at the end of its range" if each.at_bound else note
        yield f"{each.name:28}{_value(each, each.before):>14}{_value(each, each.after):>14}{note}"


def _value(each: Fitted, value: float) -> str:
    if each.name.endswith("_s"):
        return format_seconds(value)
    return format_bytes(value) if each.name.endswith("_bytes") else f"{value:.4g}"


def _errors(made: Calibrated) -> Iterator[str]:
    yield f"{'median error of':28}{'before':>14}{'after':>14}"
    for section, title in _SECTIONS.items():
        before, after = (median_error(rows, section) for rows in (made.before, made.after))
        if before is not None and after is not None:
            yield f"{title:28}{before:14.1%}{after:14.1%}"
    step = [_of_step(rows) for rows in (made.before, made.after)]
    if None not in step:
        yield f"{'error of a step':28}{step[0]:+14.1%}{step[1]:+14.1%}"


def _of_step(rows: tuple[Row, ...]) -> float | None:
    return next((row.error for row in rows if row.section == STEP), None)
