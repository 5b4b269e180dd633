"""`shardwise plan --calibrate`: fits a cluster to what runs measured, says how much better it predicts, writes it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardwise.describe.catalogue import load_cluster
from shardwise.describe.cluster_file import cluster_text
from shardwise.errors import ConfigError
from shardwise.plan.calibrate import Calibrated, Fitted, Run, calibrate
from shardwise.plan.compare_run import ACTIONS, MEMORY, STEP, TRANSFERS, WAITING, median_error
from shardwise.plan.resize import of_devices
from shardwise.plan.run_estimate import read_estimate
from shardwise.quantities import format_bytes, format_seconds
from shardwise.report.read_run import read_run

__all__ = ["calibrate_runs"]

_SECTIONS = {
    STEP: "a step and its parts",
    MEMORY: "memory of a rank",
    ACTIONS: "an action on a stage",
    WAITING: "waiting in a step",
    TRANSFERS: "a message between stages",
}


def calibrate_runs(folders: Sequence[str], *, cluster: str | None, out: Path | None) -> str:
    """The cluster of the first run's folder, fitted to all runs; `cluster` is a name or a file to begin with instead.

    Written to `out`. Returns what was fitted, as text. Raises `ConfigError`.
    """
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{out} is to be written into a folder that is not there; make {out.parent}")
    runs = [(read_estimate(folder), read_run(folder)) for folder in folders]
    ranks = max(estimate.laid_out.world_size for estimate, _ in runs)
    start = None if cluster is None else of_devices(load_cluster(cluster, ranks=ranks), ranks)
    made = calibrate(runs, start)
    lines = [*_head(runs, cluster), "", *_coefficients(made), "", *_errors(made, folders)]
    if out is None:
        return "\n".join([*lines, "", "written nowhere; --out FILE.toml keeps it"])
    steps = sum(measured.steps for _, measured in runs)
    layouts = "; ".join(str(estimate.laid_out) for estimate, _ in runs)
    comment = f"Fitted by shardwise plan --calibrate to {steps} steps of {layouts} on {time.strftime('%Y-%m-%d')}."
    out.write_text(cluster_text(made.cluster, comment=comment), encoding="utf-8")
    return "\n".join([*lines, "", f"written to {out}"])


def _head(runs: Sequence[Run], cluster: str | None) -> Iterator[str]:
    for number, (estimate, measured) in enumerate(runs):
        steps = f"{measured.steps} steps behind the first two"
        yield f"{'measured' if not number else '':14}{estimate.laid_out}, {steps}"
    yield f"given         {runs[0][0].source if cluster is None else f'the cluster {cluster}'}"


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


def _errors(made: Calibrated, folders: Sequence[str]) -> Iterator[str]:
    yield f"{'median error of':28}{'before':>14}{'after':>14}"
    for section, title in _SECTIONS.items():
        before, after = (median_error(rows, section) for rows in (made.before, made.after))
        if before is not None and after is not None:
            yield f"{title:28}{before:14.1%}{after:14.1%}"
    yield f"{'error of a step':28}{'before':>14}{'after':>14}"
    of_steps = [[row for row in rows if row.is_step] for rows in (made.before, made.after)]
    for folder, first, second in zip(folders, *of_steps, strict=True):
        if first.error is not None and second.error is not None:
            yield f"{Path(folder).name:28}{first.error:+14.1%}{second.error:+14.1%}"
