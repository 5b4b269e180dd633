"""`shardwise report`: what a run was predicted to do, beside what it did. Reads files; starts nothing."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from shardwise.plan.compare_run import compare
from shardwise.plan.run_estimate import read_estimate
from shardwise.report.read_run import read_run
from shardwise.report.text import plain_report, report_text

__all__ = ["command"]


def command(
    folder: Annotated[
        str, typer.Argument(metavar="RUN_FOLDER", help="The folder that a run writes, such as runs/demo.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="All numbers, as JSON.")] = False,
) -> None:
    """Show predicted beside measured: a step and its parts, memory of every rank, every kind of action on every stage,
    messages, bytes by axis.

    A run stores its estimate when it starts, and what it measures while it trains, so this can be asked at any time,
    also while the run goes on. Seconds are medians of its steps without the first two; those of actions are of the
    steps that \\[timeline] records.

    shardwise report runs/demo

    shardwise plan --calibrate runs/demo --out cluster.toml
    """
    estimate, measured = read_estimate(folder), read_run(folder)
    rows = compare(estimate.predicted, measured, estimate.laid_out, estimate.traffic)
    if as_json:
        print(json.dumps(plain_report(estimate, measured, rows), indent=1))
    else:
        print(report_text(estimate, measured, rows))
