"""Goes through the cases, prints a table, writes the results, ends with one line of JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.circumstances import circumstances
from benchmarks.schedules.searched.cases import cases
from benchmarks.schedules.searched.compare import compared
from benchmarks.schedules.searched.proof import proofs

__all__ = ["figures", "main", "measured"]

SECONDS = 2.0  # of each of a case's seven searches, at most
PROOF_SECONDS = 6.0  # of the solver, for each case and placement


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules.searched", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the searches' and the solver's seconds")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = circumstances("benchmarks.schedules.searched")
    record |= measured(options.share)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    output = options.output or folder / f"{record['date'][:19].replace(':', '')}.json"
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {output}")
    print(json.dumps(record["figures"]))


def measured(share: float = 1.0) -> dict[str, Any]:
    """All cases, then the proofs of the smaller ones; `figures` among them."""
    started = time.monotonic()
    print("searched schedules, simulated; seconds of a step, and gains over the best generator that fits")
    print(
        "  case                             best generator             ordered searched    gain   aware /bound  ranks"
    )
    rows = []
    for case in cases():
        rows.append(compared(case, SECONDS * share))
        print(rows[-1].line(), flush=True)
    found = {"cases": [row.values() for row in rows], "proofs": _proofs(share)}
    found["figures"] = figures(found)
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def figures(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The last line: medians over the cases, and the worst of what was proven."""
    gains = [row["gain"] for row in found["cases"]]
    closed = [proof["above"] for proof in found["proofs"] if proof["closed"]]
    return {
        "searched_gain_median": round(statistics.median(gains), 4),
        "searched_worst": min(gains),
        "searched_above_optimum": max(closed, default=None),
        "searched_gain_median_of_order_alone": _median(found, "gain_of_order_alone"),
        "searched_gain_median_of_aware_cuts": _median(found, "gain_of_aware_cuts"),
    }


def _median(found: Mapping[str, Any], key: str) -> float:
    return round(statistics.median(row[key] for row in found["cases"]), 4)


def _proofs(share: float) -> list[dict[str, Any]]:
    if importlib.util.find_spec("ortools") is None:
        print("missed: proofs of the optimum: the extra `solver` (ortools) is not installed")
        return []
    found = proofs(PROOF_SECONDS * share)
    closed = [proof for proof in found if proof["closed"]]
    print(f"proven optimum of {len(closed)} of {len(found)} smaller cases and placements; those that did not close:")
    for proof in found:
        if not proof["closed"]:
            print(f"  {proof['case']:32} {proof['placement']:8} at most {100 * proof['above']:.2f} % above")
    return found
