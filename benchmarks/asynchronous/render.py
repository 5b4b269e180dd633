"""Writes the measured part of docs/asynchronous.md, and its plot, from the newest results.

python -m benchmarks.asynchronous.render
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.asynchronous.run import table
from benchmarks.common.curves import Points, curves_svg

__all__ = ["PAGE", "PLOT", "main", "page_with", "plot_of"]

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"
PAGE, PLOT = DOCS / "asynchronous.md", DOCS / "asynchronous" / "loss.svg"
BEGIN, END = "<!-- measured -->", "<!-- end -->"


def newest() -> Mapping[str, Any] | None:
    """The results of the latest run; None where there are none."""
    files = sorted(RESULTS.glob("*.json"))
    return json.loads(files[-1].read_text()) if files else None


def page_with(page: str, record: Mapping[str, Any]) -> str:
    """The page with the measured table of `record`."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    first, steps = record["begin"], record["steps"]
    told = (
        f"(`{record['command']}`, {record['machine']}, torch {record['versions']['torch']}, commit {record['commit']}, "
        f"{record['date'][:10]}; the last {steps} of {first + steps} steps)"
    )
    plot = "![held-out loss over steps](asynchronous/loss.svg)"
    return f"{before}{BEGIN}\n{table(record['runs'])}\n\n{told}\n\n{plot}\n{END}{after}"


def plot_of(record: Mapping[str, Any]) -> str:
    """Held-out loss over steps, of every contender."""
    curves: dict[str, Points] = {name: run["held_out"] for name, run in record["runs"].items()}
    return curves_svg(curves, x="step", y="held-out loss", title="Held-out loss of the demo, dp and workers")


def main() -> None:
    """Write both."""
    record = newest()
    if record is None:
        return
    PAGE.write_text(page_with(PAGE.read_text(), record))
    PLOT.parent.mkdir(exist_ok=True)
    PLOT.write_text(plot_of(record))


if __name__ == "__main__":
    main()
